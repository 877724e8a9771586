/* The CPU's kernels of knee.py and pairs.py, compiled on their first use and called by native.py.

   Both work on a range of rows, so that threads can share them, and need nothing but the C library. Compile with
   -ffp-contract=off: a fused multiply-add would round otherwise than torch does, and the knee is compared bit by bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BINS 4096
#define LANES 32 /* independent extremes, so that the compiler can use vector instructions */
#define SMALL 64 /* elements that an insertion sort orders faster than qsort */

typedef struct {
    float value;
    int32_t column;
} Entry;

/* By descending value, equal values by column. */
static int after(const Entry *a, const Entry *b) {
    return a->value < b->value || (a->value == b->value && a->column > b->column);
}

static int compare(const void *a, const void *b) { return after(a, b) ? 1 : -1; }

static void sort(Entry *entries, long count) {
    if (count > SMALL) {
        qsort(entries, count, sizeof(Entry), compare);
        return;
    }
    for (long i = 1; i < count; i++) {
        Entry entry = entries[i];
        long j = i;
        for (; j > 0 && after(&entries[j - 1], &entry); j--) entries[j] = entries[j - 1];
        entries[j] = entry;
    }
}

/* Columns [rows, vocab] of the logits up to the knee, in order (only the first k of a row are written), and of every row
   k, the smallest logit that counts, and the smallest and the largest finite logit. Returns 0, or 1 without memory. */
int leading(const float *logits, long stride, long vocab, long start, long stop, int32_t *columns, int64_t *ks,
            float *thresholds, float *lows, float *highs) {
    uint16_t *bins = malloc(vocab * sizeof(uint16_t));
    float *finite = malloc(vocab * sizeof(float));
    Entry *entries = malloc(vocab * sizeof(Entry));
    int32_t *taken = malloc(vocab * sizeof(int32_t));
    long counts[BINS], others[BINS], places[BINS + 1];
    int failed = !bins || !finite || !entries || !taken;
    for (long row = start; row < stop && !failed; row++) {
        const float *z = logits + row * stride;
        int32_t *out = columns + row * vocab;
        float low = INFINITY, high = -INFINITY, least[LANES], most[LANES];
        int odd = 0, infinite[LANES] = {0};
        for (long j = 0; j < LANES; j++) least[j] = INFINITY, most[j] = -INFINITY;
        for (long i = 0; i + LANES <= vocab; i += LANES)
            for (long j = 0; j < LANES; j++) {
                least[j] = z[i + j] < least[j] ? z[i + j] : least[j];
                most[j] = z[i + j] > most[j] ? z[i + j] : most[j];
                infinite[j] |= !(fabsf(z[i + j]) < INFINITY);
            }
        for (long j = 0; j < LANES; j++) {
            low = least[j] < low ? least[j] : low;
            high = most[j] > high ? most[j] : high;
            odd |= infinite[j];
        }
        for (long i = vocab - vocab % LANES; i < vocab; i++) {
            low = z[i] < low ? z[i] : low;
            high = z[i] > high ? z[i] : high;
            odd |= !(fabsf(z[i]) < INFINITY);
        }
        if (odd) { /* infinities count as the row's extreme finite logits */
            int broken = 0;
            low = INFINITY, high = -INFINITY;
            for (long i = 0; i < vocab; i++) {
                broken |= z[i] != z[i];
                if (!(fabsf(z[i]) < INFINITY)) continue;
                low = z[i] < low ? z[i] : low;
                high = z[i] > high ? z[i] : high;
            }
            if (low > high) low = high = 0;
            for (long i = 0; i < vocab; i++) finite[i] = z[i] < low ? low : z[i] > high ? high : z[i];
            if (broken) low = high = NAN;
            z = finite;
        }
        lows[row] = low, highs[row] = high;
        if (!(high > low)) { /* constant, or with a NaN: no knee */
            out[0] = 0, out[1] = 1;
            ks[row] = 2, thresholds[row] = high == high ? high : 0;
            continue;
        }

        /* Bin 0 holds the largest logits. Whatever the rounding, bins ascend as logits descend. */
        double spread = (double)high - (double)low;
        float scale = spread > 1e-30 && spread < 1e38 ? (float)(4 * (BINS - 1) / spread) : 0;
        for (long i = 0; i < vocab; i++) bins[i] = (uint16_t)(int)((high * 0.25f - z[i] * 0.25f) * scale);
        memset(counts, 0, BINS * sizeof(long));
        memset(others, 0, BINS * sizeof(long));
        for (long i = 0; i + 1 < vocab; i += 2) counts[bins[i]]++, others[bins[i + 1]]++; /* neighbours don't wait */
        if (vocab % 2) counts[bins[vocab - 1]]++;
        for (long b = 0; b < BINS; b++) counts[b] += others[b];

        /* The last bin that can hold the knee; knee.py has the argument. 1.5: half a bin absorbs the rounding. */
        double best = -INFINITY;
        long above = 0, last = 0;
        for (long b = 0; b < BINS; b++) {
            double height = (double)b / (BINS - 1) - (above + 1.0) / vocab;
            if (counts[b] && height > best) best = height;
            above += counts[b];
        }
        above = 0;
        for (long b = 0; b < BINS; b++) {
            double height = (double)b / (BINS - 1) - (above + 1.0) / vocab;
            if (counts[b] && height >= best - 1.5 / (BINS - 1)) last = b;
            above += counts[b];
        }

        /* Each logit goes to its bin's place, and every bin is sorted by itself. */
        places[0] = 0;
        for (long b = 0; b <= last; b++) places[b + 1] = places[b] + counts[b];
        long total = 0;
        for (long i = 0; i < vocab; i++) taken[total] = (int32_t)i, total += bins[i] <= last;
        for (long i = 0; i < total; i++) {
            Entry entry = {z[taken[i]], taken[i]};
            entries[places[bins[taken[i]]]++] = entry;
        }
        for (long b = 0, first = 0; b <= last; first = places[b], b++) sort(entries + first, counts[b]);

        double highest = -INFINITY, bottom = low, range = (double)high - (double)low;
        long k = 1;
        for (long i = 0; i < total; i++) {
            double height = (1 - (double)(i + 1) / vocab) - ((double)entries[i].value - bottom) / range;
            if (height > highest) highest = height, k = i + 1;
        }
        thresholds[row] = entries[k - 1].value;
        k = k < 2 ? 2 : k;
        ks[row] = k;
        for (long i = 0; i < k; i++) out[i] = entries[i].column;
    }
    free(bins), free(finite), free(entries), free(taken);
    return failed;
}

#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("Ofast"))) /* lets it call the vector library's exp */
#endif
static void exponentials(const double *restrict values, double *restrict out, long count) {
    for (long i = 0; i < count; i++) out[i] = exp(values[i]);
}

static double clamp(double value, double low, double high) { return value < low ? low : value > high ? high : value; }

/* Add to `losses` [rows] the pair KL of one order, and write its gradient [rows, width] by the student's logits at
   `indices` [rows, width] unless `gradient` is NULL; pairs.py has the equations. `bounds` holds the smallest and largest
   finite logit of the student's and of the teacher's row. Returns 0, 1 without memory, or 2 where logits over tau lie
   further apart than `most` or are NaN. */
int pairs(const float *student, const float *teacher, long student_stride, long teacher_stride, const int64_t *indices,
          const int64_t *ks, long width, const float *bounds, double tau, int reverse, double most, long start,
          long stop, double *losses, float *gradient) {
    double *q = malloc(width * 8 * sizeof(double)), *p = q + width, *q_up = p + width, *p_up = q_up + width;
    double *q_before = p_up + width, *p_before = q_before + width, *ahead = p_before + width, *slope = ahead + width;
    int failed = !q;
    for (long row = start; row < stop && !failed; row++) {
        const float *s = student + row * student_stride, *t = teacher + row * teacher_stride, *bound = bounds + row * 4;
        const int64_t *index = indices + row * width;
        const long k = ks[row];
        double *mine = reverse ? q : p, *other = reverse ? p : q;
        for (long i = 0; i < k; i++) mine[i] = clamp(s[index[i]], bound[0], bound[1]);
        for (long i = 0; i < k; i++) other[i] = clamp(t[index[i]], bound[2], bound[3]);
        double q_top = q[0], p_top = p[0], q_low = q[0], p_low = p[0];
        for (long i = 1; i < k; i++) {
            q_top = q[i] > q_top ? q[i] : q_top, q_low = q[i] < q_low ? q[i] : q_low;
            p_top = p[i] > p_top ? p[i] : p_top, p_low = p[i] < p_low ? p[i] : p_low;
        }
        if (!((q_top - q_low) / tau <= most && (p_top - p_low) / tau <= most) || bound[0] != bound[0] ||
            bound[2] != bound[2]) {
            failed = 2;
            break;
        }
        for (long i = 0; i < k; i++) q[i] = (q[i] - q_top) / tau, p[i] = (p[i] - p_top) / tau;
        exponentials(q, q_up, k);
        exponentials(p, p_up, k);

        double q_sum = 0, p_sum = 0, ahead_sum = 0, z_q = 0, z_p = 0, expected = 0;
        for (long i = 0; i < k; i++) {
            double delta = q[i] - p[i], down = 1 / q_up[i];
            q_before[i] = q_sum, p_before[i] = p_sum, ahead[i] = ahead_sum;
            z_q += down * q_sum;
            z_p += p_sum / p_up[i];
            expected += down * (ahead_sum - delta * q_sum);
            q_sum += q_up[i], p_sum += p_up[i], ahead_sum += q_up[i] * delta;
        }
        expected /= z_q;
        losses[row] += expected - log(z_q) + log(z_p);
        if (!gradient) continue;

        double q_after = 0, p_after = 0, behind = 0;
        for (long i = k - 1; i >= 0; i--) {
            double delta = q[i] - p[i], q_down = 1 / q_up[i];
            if (reverse) {
                double first = q_up[i] * ((delta - expected) * q_after - behind);
                double second = q_down * ((delta + expected) * q_before[i] - ahead[i]);
                slope[i] = (first + second) / z_q;
                behind += q_down * delta;
            } else {
                double p_down = 1 / p_up[i];
                slope[i] = (p_up[i] * p_after - p_down * p_before[i]) / z_p - (q_up[i] * q_after - q_down * q_before[i]) / z_q;
                p_after += p_down;
            }
            q_after += q_down;
        }
        float *out = gradient + row * width;
        for (long i = 0; i < k; i++) out[i] = isinf(s[index[i]]) ? 0 : (float)(slope[i] / tau);
        for (long i = k; i < width; i++) out[i] = 0;
    }
    free(q);
    return failed;
}
