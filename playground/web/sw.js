// Offline once loaded: the network first, so that a new student is seen; what it gave last time where there is none.

const STORE = 'student';

// The page itself came before this worker did, so it is fetched once more; all else passes through below.
const PAGE = ['./', 'style.css', 'app.js'];

self.addEventListener('install', (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(STORE).then((store) => store.addAll(PAGE)));
});
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));
self.addEventListener('fetch', (event) => {
  const { request } = event;
  if (request.method !== 'GET' || new URL(request.url).origin !== self.location.origin) return;
  event.respondWith(
    (async () => {
      const store = await caches.open(STORE);
      try {
        const response = await fetch(request);
        if (response.status === 200) await store.put(request, response.clone());
        return response;
      } catch (error) {
        const known = await store.match(request, { ignoreVary: true });
        if (known) return known;
        throw error;
      }
    })(),
  );
});
