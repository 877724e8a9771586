// Makes the page work offline once loaded. It asks the network first, so that a new student is seen, then its cache.

const STORE = 'student';

// The page was loaded before this worker, so it is fetched again; everything else goes through the handler below.
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
