/* CPU kernels for knee.py and pairs.py, compiled on first use and called by native.py.

   Each takes a job, whose rows may be distributed over threads, and needs only the C library. Compile with
   -ffp-contract=off: a fused multiply-add rounds differently than torch, and the knee must be equal bit for bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BINS 2048
#define LANES 32      /* independent extremes, so that the compiler can use vector instructions */
#define DIGITS 2048   /* of the radix sort; three digits represent a float */
#define LINE 16       /* floats per cache line */
#define NO_MEMORY 1
#define NOT_MINE 2    /* must be computed by torch's operations */

typedef struct {
    int64_t next, rows, failed; /* the next row that no thread has taken */
} Rows;

static int64_t take(Rows *rows) { return __atomic_fetch_add(&rows->next, 1, __ATOMIC_RELAXED); }

typedef struct {
    Rows rows;
    int64_t stride, vocab;
    const float *logits;
    int32_t *columns;
    int64_t *ks;
    float *thresholds, *lows, *highs;
} Leading;

typedef struct {
    uint32_t key; /* ascends as the logit descends */
    int32_t column;
} Entry;

static Entry as_entry(float logit, int32_t column) {
    uint32_t bits;
    logit += 0.0f; /* -0 equals 0 */
    memcpy(&bits, &logit, sizeof(bits));
    Entry entry = {bits & 0x80000000u ? bits : ~bits & 0x7fffffffu, column};
    return entry;
}

static float logit_of(Entry entry) {
    uint32_t bits = entry.key & 0x80000000u ? entry.key : ~entry.key & 0x7fffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof(logit));
    return logit;
}

/* Stable radix sort with three digits, by descending logit. The result is in `spare`. */
static void sort(Entry *entries, Entry *spare, long count) {
    uint32_t places[3][DIGITS] = {0};
    for (long i = 0; i < count; i++)
        for (int digit = 0; digit < 3; digit++) places[digit][entries[i].key >> 11 * digit & (DIGITS - 1)]++;
    for (int digit = 0; digit < 3; digit++) {
        uint32_t sum = 0;
        for (long b = 0; b < DIGITS; b++) {
            uint32_t here = places[digit][b];
            places[digit][b] = sum, sum += here;
        }
        for (long i = 0; i < count; i++) spare[places[digit][entries[i].key >> 11 * digit & (DIGITS - 1)]++] = entries[i];
        Entry *swap = entries;
        entries = spare, spare = swap;
    }
}

/* Columns [rows, vocab] of the logits up to the knee, in order (only the first k of a row are written), and for every
   row k, the smallest logit that counts, and the smallest and the largest finite logit. */
void leading(Leading *job) {
    const long vocab = job->vocab;
    uint16_t *bins = malloc(vocab * sizeof(uint16_t));
    float *finite = malloc(vocab * sizeof(float));
    Entry *entries = malloc(vocab * sizeof(Entry)), *sorted = malloc(vocab * sizeof(Entry));
    double *heights = malloc((vocab > BINS ? vocab : BINS) * sizeof(double));
    uint32_t counts[BINS], others[BINS];
    if (!bins || !finite || !entries || !sorted || !heights) job->rows.failed = NO_MEMORY;
    for (long row; !job->rows.failed && (row = take(&job->rows)) < job->rows.rows;) {
        const float *z = job->logits + row * job->stride;
        int32_t *out = job->columns + row * vocab;
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
        job->lows[row] = low, job->highs[row] = high;
        if (!(high > low)) { /* constant, or with a NaN: no knee */
            out[0] = 0, out[1] = 1;
            job->ks[row] = 2, job->thresholds[row] = high == high ? high : 0;
            continue;
        }

        /* Bin 0 has the largest logits. Despite rounding, bins ascend as logits descend. */
        double spread = (double)high - (double)low;
        float scale = spread > 1e-30 && spread < 1e38 ? (float)(4 * (BINS - 1) / spread) : 0;
        for (long i = 0; i < vocab; i++) bins[i] = (uint16_t)(int)((high * 0.25f - z[i] * 0.25f) * scale);
        memset(counts, 0, sizeof(counts));
        memset(others, 0, sizeof(others));
        for (long i = 0; i + 1 < vocab; i += 2) counts[bins[i]]++, others[bins[i + 1]]++; /* neighbours don't wait */
        if (vocab % 2) counts[bins[vocab - 1]]++;

        /* The last bin that can contain the knee, see knee.py. 1.5 includes half a bin for rounding. */
        const double a_bin = 1.0 / (BINS - 1), a_rank = 1.0 / vocab;
        double best = -INFINITY;
        long above = 0, last = BINS - 1;
        for (long b = 0; b < BINS; b++) {
            long here = counts[b] + others[b];
            heights[b] = here ? b * a_bin - (above + 1) * a_rank : -INFINITY;
            best = heights[b] > best ? heights[b] : best;
            above += here;
        }
        while (heights[last] < best - 1.5 * a_bin) last--;

        long total = 0;
        for (long i = 0; i < vocab; i++) {
            entries[total].column = (int32_t)i; /* without a branch, which would be mispredicted too often */
            total += bins[i] <= last;
        }
        for (long i = 0; i < total; i++) entries[i] = as_entry(z[entries[i].column], entries[i].column);
        sort(entries, sorted, total);

        const double bottom = low;
        for (long i = 0; i < total; i++)
            heights[i] = (1 - (double)(i + 1) / vocab) - ((double)logit_of(sorted[i]) - bottom) / spread;
        long k = 1;
        best = heights[0];
        for (long i = 1; i < total; i++)
            if (heights[i] > best) best = heights[i], k = i + 1;
        job->thresholds[row] = logit_of(sorted[k - 1]);
        k = k < 2 ? 2 : k;
        job->ks[row] = k;
        for (long i = 0; i < k; i++) out[i] = sorted[i].column;
    }
    free(bins), free(finite), free(entries), free(sorted), free(heights);
}

/* exp of numbers from -700 to 0, up to some units in the last place; written for vectorisation. */
static void exponentials(const double *restrict values, double *restrict out, long count) {
    const double round = 0x1.8p52; /* adding it to a small number leaves the nearest integer in the last bits */
    for (long i = 0; i < count; i++) {
        double shifted = values[i] * 1.4426950408889634 + round, n = shifted - round;
        double r = (values[i] - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b398p-40, power = 1.0 / 479001600; /* 12! */
        power = power * r + 1.0 / 39916800, power = power * r + 1.0 / 3628800, power = power * r + 1.0 / 362880;
        power = power * r + 1.0 / 40320, power = power * r + 1.0 / 5040, power = power * r + 1.0 / 720;
        power = power * r + 1.0 / 120, power = power * r + 1.0 / 24, power = power * r + 1.0 / 6;
        power = ((power * r + 0.5) * r + 1) * r + 1;
        uint64_t bits;
        double two_to_n;
        memcpy(&bits, &shifted, sizeof(bits));
        bits = (bits + 1023) << 52;
        memcpy(&two_to_n, &bits, sizeof(two_to_n));
        out[i] = power * two_to_n;
    }
}

typedef struct {
    int64_t width;
    const int64_t *indices, *ks;
    float *gradient; /* NULL if not needed */
} Lead;

typedef struct {
    Rows rows;
    int64_t vocab, reverse;
    int64_t strides[2];
    const float *logits[2]; /* of the student and the teacher */
    Lead leads[2];
    const float *bounds; /* [rows, 4]: the smallest and the largest finite logit of the student's and the teacher's */
    double tau, most;
    double *losses;
} Pairs;

/* One side's scaled logits minus their largest; false if they differ by more than `most`. */
static int scale(const float *raw, double *a, double *up, double *down, long k, double tau, double most) {
    float top = raw[0], low = raw[0];
    for (long i = 1; i < k; i++) top = raw[i] > top ? raw[i] : top, low = raw[i] < low ? raw[i] : low;
    if (!(((double)top - (double)low) / tau <= most)) return 0;
    for (long i = 0; i < k; i++) a[i] = ((double)raw[i] - (double)top) / tau;
    exponentials(a, up, k);
    for (long i = 0; i < k; i++) down[i] = 1 / up[i];
    return 1;
}

/* Loss [rows] in float64, the pair KLs of both orders, and for each order its gradient [rows, width] by the student's
   logits at `indices`. The equations are in pairs.py. */
void pairs(Pairs *job) {
    const long width = job->leads[0].width > job->leads[1].width ? job->leads[0].width : job->leads[1].width;
    float *raw = malloc(4 * width * sizeof(float));
    double *q = malloc(9 * width * sizeof(double)), *q_up = q + width, *q_down = q_up + width, *p = q_down + width;
    double *p_up = p + width, *p_down = p_up + width, *q_before = p_down + width, *p_before = q_before + width;
    double *ahead = p_before + width;
    if (!raw || !q) job->rows.failed = NO_MEMORY;
    for (long row; !job->rows.failed && (row = take(&job->rows)) < job->rows.rows;) {
        const float *bound = job->bounds + row * 4;
        int infinite = 0;
        if (bound[0] != bound[0] || bound[2] != bound[2]) job->rows.failed = NOT_MINE;
        for (int side = 0; side < 2; side++) {
            const float *z = job->logits[side] + row * job->strides[side], low = bound[2 * side], high = bound[2 * side + 1];
            /* Reading a row in order is several times faster than reading it by indices. */
            for (long i = 0; i < job->vocab; i += LINE) __builtin_prefetch(z + i);
            for (int order = 0; order < 2; order++) {
                const Lead *lead = &job->leads[order];
                const int64_t *index = lead->indices + row * lead->width;
                float *out = raw + (2 * order + side) * width;
                for (long i = 0; i < lead->ks[row]; i++) {
                    float value = z[index[i]];
                    infinite |= side == 0 && isinf(value);
                    out[i] = value < low ? low : value > high ? high : value;
                }
            }
        }
        for (int order = 0; order < 2; order++) {
            const Lead *lead = &job->leads[order];
            const long k = lead->ks[row];
            const float *student = raw + 2 * order * width, *teacher = student + width;
            if (!scale(job->reverse ? student : teacher, q, q_up, q_down, k, job->tau, job->most) ||
                !scale(job->reverse ? teacher : student, p, p_up, p_down, k, job->tau, job->most))
                job->rows.failed = NOT_MINE;
            if (job->rows.failed) break;

            double q_sum = 0, p_sum = 0, ahead_sum = 0, z_q = 0, z_p = 0, expected = 0;
            for (long i = 0; i < k; i++) {
                double delta = q[i] - p[i];
                q_before[i] = q_sum, p_before[i] = p_sum, ahead[i] = ahead_sum;
                z_q += q_down[i] * q_sum;
                z_p += p_down[i] * p_sum;
                expected += q_down[i] * (ahead_sum - delta * q_sum);
                q_sum += q_up[i], p_sum += p_up[i], ahead_sum += q_up[i] * delta;
            }
            expected /= z_q;
            job->losses[row] += expected - log(z_q) + log(z_p);
            if (!lead->gradient) continue;

            float *out = lead->gradient + row * lead->width;
            const double q_scale = 1 / (z_q * job->tau), p_scale = 1 / (z_p * job->tau);
            double q_after = 0, p_after = 0, behind = 0;
            for (long i = k - 1; i >= 0; i--) {
                if (job->reverse) {
                    double delta = q[i] - p[i];
                    double first = q_up[i] * ((delta - expected) * q_after - behind);
                    double second = q_down[i] * ((delta + expected) * q_before[i] - ahead[i]);
                    out[i] = (float)((first + second) * q_scale);
                    behind += q_down[i] * delta;
                } else {
                    double flow_p = p_up[i] * p_after - p_down[i] * p_before[i];
                    double flow_q = q_up[i] * q_after - q_down[i] * q_before[i];
                    out[i] = (float)(flow_p * p_scale - flow_q * q_scale);
                    p_after += p_down[i];
                }
                q_after += q_down[i];
            }
            memset(out + k, 0, (lead->width - k) * sizeof(float));
            if (!infinite) continue;
            const float *z = job->logits[0] + row * job->strides[0];
            for (long i = 0; i < k; i++)
                if (isinf(z[lead->indices[row * lead->width + i]])) out[i] = 0;
        }
    }
    free(raw), free(q);
}

typedef struct {
    Rows rows;
    int64_t vocab;
    Lead leads[2];
    const float *factors;
    float *out;
} Spread;

/* Fill `out` [rows, vocab] with the gradients of both orders at their indices, times the row's factor. */
void spread(Spread *job) {
    for (long row; (row = take(&job->rows)) < job->rows.rows;) {
        float *out = job->out + row * job->vocab;
        memset(out, 0, job->vocab * sizeof(float));
        for (int order = 0; order < 2; order++) {
            const Lead *lead = &job->leads[order];
            for (long i = row * lead->width; i < row * lead->width + lead->ks[row]; i++)
                out[lead->indices[i]] += lead->gradient[i] * job->factors[row];
        }
    }
}
