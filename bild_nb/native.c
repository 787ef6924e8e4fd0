/* A pass of a T5 in one call. nbs/11_native.ipynb shows this file piece by piece, with the reasons. */

/* --------------------------------------- types --------------------------------------- */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static int omp_get_thread_num(void) { return 0; }
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#ifdef __AVX512BW__
enum { WIDTH = 16, MOST = 12 }; /* floats in a vector; rows whose sums a product keeps in registers */
#else
enum { WIDTH = 8, MOST = 3 };
#endif
enum { PANEL = 32, PARTS = PANEL/WIDTH, FEW = 5, ROWS = 192 };
typedef float V __attribute__((vector_size(WIDTH*4), aligned(4))); /* unaligned loads */
typedef int32_t VI __attribute__((vector_size(WIDTH*4), aligned(4)));
enum { FP32, BF16, INT8 }; /* what keys and values are kept in */

typedef struct {
    const void *w;       /* panels of 32 outputs */
    const float *scale;  /* of each output in int8; 0: fp32 */
    const int32_t *sums; /* of the weights of each output, in int8 */
    int out, in;
} Matrix;

typedef struct {
    Matrix qkv, o, cross_kv, cross_q, cross_o, wi, wo;
    const float *norm, *cross_norm, *feed_norm;
} Layer;

typedef struct { /* an encoder or a decoder */
    int d, heads, dk, ff, gated, act, layers, causal, kv;
    float eps;
    long words; /* rows of the embedding */
    const float *embedding, *norm;
    const Layer *layer;
    Matrix head; /* a decoder's */
} Stack;

typedef struct { /* what belongs to one text */
    long vocab;                     /* ids that can be written are below this */
    const int64_t *never, *ends;    /* ids that are never written, and that end a text */
    int nevers, n_ends;
    const float *line; long far;    /* position biases: a line for each head, from distance 1 - far */
    const float *mask;              /* added to the scores of the source; 0: none */
    char *kv; long room;            /* keys and values of the text, for `room` tokens */
    char *cross; long n, source;    /* of the source: `n` tokens, memory for `source` */
    float *work; long floats;       /* working memory */
    int threads;
} Text;

typedef struct { /* a text's part of a pass */
    const Text *text;
    const int64_t *tokens; long k, at; /* k tokens, the first at position `at` */
    long last, more;                   /* positions whose logits are wanted; tokens that come in later passes */
} Part;

typedef struct { /* a draft: it begins with a part, and ends for one of the reasons below */
    Part part;
    long most;
    int64_t *found; float *confidence;
    long n, end; /* tokens; -1 while it goes on */
} Draft;

enum { DONE = 0, BAD_TOKEN = -1, BAD_DRAFT = -2, BAD_SIZE = -3 }; /* what a call returns */

long struct_size(int which) {
    switch (which) {
        case 0: return sizeof(Matrix);
        case 1: return sizeof(Layer);
        case 2: return sizeof(Stack);
        case 3: return sizeof(Text);
        case 4: return sizeof(Part);
        default: return sizeof(Draft);
    }
}

/* asks for large pages: then a pass over many megabytes of weights looks few of them up */
void large_pages(void *at, long bytes) {
#ifdef MADV_HUGEPAGE
    madvise(at, bytes, MADV_HUGEPAGE);
#endif
}

/* --------------------------------------- parts --------------------------------------- */

INLINE float fast_exp(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x; /* NaN stays NaN */
    float n = rintf(x*1.44269504f), r = x - n*.693359375f + n*2.12194440e-4f;
    float p = 1.f + r + r*r*(.5f + r*(.166666655f + r*(.0416657962f
              + r*(8.33345205e-3f + r*1.39819994e-3f))));
    union { uint32_t i; float f; } two = { (uint32_t)((int32_t)n + 127) << 23 };
    return p*two.f;
}

INLINE V larger(V a, V b) { /* a > b ? a : b, also of NaN */
#if defined(__AVX512BW__)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#else
    VI up = a > b;
    return (V)((up & (VI)a) | (~up & (VI)b));
#endif
}

INLINE V exps(V x) { /* fast_exp of numbers that are at most 0 */
    x = larger((V){0} - 87.f, x); /* NaN stays NaN */
    V at = x*1.44269504f + 12582912.f; /* 1.5*2^23: here whole numbers are 1 apart, so this rounds */
    V n = at - 12582912.f, r = x - n*.693359375f + n*2.12194440e-4f;
    V p = 1.f + r + r*r*(.5f + r*(.166666655f + r*(.0416657962f + r*(8.33345205e-3f + r*1.39819994e-3f))));
    VI two = ((VI)at << 23) + (127 << 23); /* the last bits of `at` are n */
    return p*(V)two;
}

INLINE float fold(V v) { /* the largest of a vector */
    float a[WIDTH];
    memcpy(a, &v, sizeof a);
    UNROLL for (int w = WIDTH/2; w; w /= 2)
        for (int j = 0; j < w; j++) a[j] = a[j] > a[j + w] ? a[j] : a[j + w];
    return a[0];
}

INLINE float add(V v) { /* the sum of a vector */
    float a[WIDTH];
    memcpy(a, &v, sizeof a);
    UNROLL for (int w = WIDTH/2; w; w /= 2)
        for (int j = 0; j < w; j++) a[j] += a[j + w];
    return a[0];
}

/* ---------------------------------------- rows ---------------------------------------- */

static float largest(const float *x, int n, float sign) { /* of sign*x */
    float top = -INFINITY;
    int i = 0;
    if (n >= WIDTH) {
        V m = sign**(const V *)x;
        for (i = WIDTH; i + WIDTH <= n; i += WIDTH) m = larger(sign**(const V *)(x + i), m);
        top = fold(m);
    }
    for (; i < n; i++) top = sign*x[i] > top ? sign*x[i] : top;
    return top;
}

static float exp_sum(const float *z, int n, float top) {
    float sum;
    V total = {0};
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) total += exps(*(const V *)(z + i) - top);
    for (sum = add(total); i < n; i++) sum += fast_exp(z[i] - top);
    return sum;
}

static void norm(const float *x, const float *w, int k, int d, float eps, float *y) {
    for (int r = 0; r < k; r++, x += d, y += d) {
        V squares = {0};
        int i = 0;
        for (; i + WIDTH <= d; i += WIDTH) squares += *(const V *)(x + i)**(const V *)(x + i);
        float sum = add(squares);
        for (; i < d; i++) sum += x[i]*x[i];
        float s = 1.f/sqrtf(sum/d + eps);
        for (i = 0; i < d; i++) y[i] = x[i]*s*w[i];
    }
}

/* ---------------------------------------- fp32 ---------------------------------------- */

#define FETCH(at) __builtin_prefetch((const char *)v + (at), 0, 2); /* into the second cache */
#define AHEAD if (R > FEW) { FETCH(16384) FETCH(16448) }
/* where R results will lie: asked for before the sums begin, for a miss takes as long as many of these */
#define RESULTS(out) if (R > FEW) UNROLL for (int r = 0; r < R; r++) { \
        __builtin_prefetch(y + r*(out), 1); \
        __builtin_prefetch(y + r*(out) + PANEL/2, 1); \
    }

/* What comes out of a panel, for `rows` rows of which `cols` outputs count. (It is a function of its own:
   inlined, it makes GCC keep fewer of the sums in registers.) */
static __attribute__((noinline)) void put(const V *sums, int rows, float *y, long out, int cols, int add) {
    for (int r = 0; r < rows; r++, sums += PARTS, y += out)
        if (cols == PANEL) UNROLL for (int p = 0; p < PARTS; p++) {
            V *to = (V *)y + p;
            *to = add ? *to + sums[p] : sums[p];
        } else {
            float a[PANEL];
            memcpy(a, sums, sizeof a);
            for (int c = 0; c < cols; c++) y[c] = add ? y[c] + a[c] : a[c];
        }
}

/* Two products of bf16 in a word, added to a sum in fp32; and a vector in bf16 */
#ifdef __AVX512BF16__
enum { PAIRS = 1 };
INLINE void halve(V x, uint16_t *to) { __m256bh h = _mm512_cvtneps_pbh((__m512)x); memcpy(to, &h, sizeof h); }
INLINE V dot2(V acc, float x, V w) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"((V){0} + x), "v"(w));
    return acc;
}
#else
enum { PAIRS = 0 }; /* not here */
INLINE void halve(V x, uint16_t *to) {}
INLINE V dot2(V acc, float x, V w) { return acc; }
#endif

/* y (R, cols) = or += x (R, in) times a panel; x has its rows `row` apart and its inputs `next`; with `two`
   an input is a pair in bf16 */
INLINE void panel32(const int two, const int R, const float *w, const float *x, const long row, const long next, int in,
                    float *y, long out, int cols, int add) {
    V acc[MOST][PARTS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < PARTS; p++) acc[r][p] = (V){0};
    RESULTS(out)
    for (int i = 0; i < in; i++, x += next) { /* fp32 */
        const V *v = (const V *)(w + (long)i*PANEL);
        AHEAD
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < PARTS; p++) acc[r][p] = two ? dot2(acc[r][p], x[r*row], v[p]) : acc[r][p] + v[p]*x[r*row];
    }
    V sums[MOST*PARTS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PARTS; p++) sums[r*PARTS + p] = acc[r][p];
    put(sums, R, y, out, cols, add);
}

/* ---------------------------------------- int8 ---------------------------------------- */

#if defined(__AVX512VNNI__)
enum { TOP = 255 };
typedef __m512i I;
INLINE I dot4(I acc, int32_t x, I w) {
    /* GCC 12 keeps fewer sums in registers when this is _mm512_dpbusd_epi32 */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(_mm512_set1_epi32(x)), "v"(w));
    return acc;
}
#elif defined(__AVX512BW__)
enum { TOP = 127 };
typedef __m512i I;
INLINE I dot4(I acc, int32_t x, I w) {
    I pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(x), w);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__)
enum { TOP = 127 };
typedef __m256i I;
INLINE I dot4(I acc, int32_t x, I w) {
    I pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(x), w);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
enum { TOP = 0 }; /* no int8 here */
typedef VI I;
INLINE I dot4(I acc, int32_t x, I w) { return acc; }
#endif
typedef I In __attribute__((aligned(1))); /* in memory: loads are unaligned */
typedef int32_t Word __attribute__((may_alias)); /* four bytes of whatever */
int int8_top(void) { return TOP; }

static int fours(int in) { return (in + 3)/4; } /* groups of four inputs */

static void quantize(const float *x, int n, uint8_t *restrict q, float *step, int32_t *zero) {
    V most = {0}, least = {0}; /* of 0 and all x */
    VI nan = {0};
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        V v = *(const V *)(x + i);
        most = larger(v, most);
        least = larger(-v, least);
        nan |= v != v;
    }
    float hi = fold(most), lo = -fold(least);
    int bad = !!add((V)(nan & (VI)((V){0} + 1.f)));
    for (; i < n; i++) {
        hi = x[i] > hi ? x[i] : hi;
        lo = x[i] < lo ? x[i] : lo;
        bad |= x[i] != x[i];
    }
    bad |= !(hi - lo < INFINITY);
    float s = !bad && hi > lo ? (hi - lo)/(TOP + !TOP) : 1, by = 1/s;
    int z = bad ? 0 : (int)(-lo*by + .5f);
    for (int i = 0; i < n; i++) {
        int v = (int)(x[i]*by + (z + .5f));
        q[i] = v < 0 ? 0 : v > TOP ? TOP : v;
    }
    for (int i = n; i < fours(n)*4; i++) q[i] = 0;
    *step = bad ? NAN : s;
    *zero = z;
}

/* --------------------------------------- panel8 --------------------------------------- */

/* from sums of int8 to numbers, as `put` */
static __attribute__((noinline)) void put8(const VI *sums, int rows, const Matrix *m, int first, const float *step,
                                           const int32_t *zero, float *y, int cols, int add) {
    const V *scale = (const V *)(m->scale + first);
    const VI *all = (const VI *)(m->sums + first);
    V x[MOST*PARTS];
    for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < PARTS; p++)
        x[r*PARTS + p] = __builtin_convertvector(sums[r*PARTS + p] - zero[r]*all[p], V)*(step[r]*scale[p]);
    put(x, rows, y, m->out, cols, add);
}

/* as panel32, of rows in int8: x is counted in groups of four inputs */
INLINE void panel8(const int R, const Matrix *m, int first, const Word *x, const long row, const long next,
                   const float *step, const int32_t *zero, float *y, int cols, int add) {
    int groups = fours(m->in);
    const int8_t *w = (const int8_t *)m->w + (long)first*groups*4;
    I acc[MOST][PARTS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < PARTS; p++) acc[r][p] = (I){0};
    RESULTS((long)m->out)
    for (int i = 0; i < groups; i++, x += next) {
        const In *v = (const In *)(w + (long)i*PANEL*4);
        AHEAD
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int p = 0; p < PARTS; p++) acc[r][p] = dot4(acc[r][p], x[r*row], v[p]);
    }
    VI sums[MOST*PARTS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PARTS; p++) sums[r*PARTS + p] = (VI)acc[r][p];
    put8(sums, R, m, first, step, zero, y, cols, add);
}

/* -------------------------------------- product -------------------------------------- */

typedef struct { /* for the rows of a product, at most ROWS at a time */
    Word *bytes; /* in int8, groups of four inputs */
    Word *sides; /* in the order in which the panels read many of them, as words of four bytes */
} Rows;

/* rows of n words side by side: the first word of each, then the second of each */
static void pack(const Word *x, int rows, int n, Word *to) {
    for (int r = 0; r < rows; r++, x += n)
        for (int i = 0; i < n; i++) to[(long)i*rows + r] = x[i];
}

/* y (k, out) = or += x (k, in) w' */
static void product(const Matrix *m, const float *x, int k, float *y, int add, const Rows *w, int threads) {
    int panels = (m->out + PANEL - 1)/PANEL, n = m->scale ? fours(m->in) : m->in; /* words of a row */
    float step[ROWS];
    int32_t zero[ROWS];
    for (; k > 0; k -= ROWS, x += (long)ROWS*m->in, y += (long)ROWS*m->out) {
        int rows = k < ROWS ? k : ROWS, blocks = (rows + MOST - 1)/MOST, packed = MOST > FEW && rows > FEW;
        const Word *words = m->scale ? w->bytes : (const Word *)x, *from = packed ? w->sides : words;
        if (m->scale)
            for (int r = 0; r < rows; r++)
                quantize(x + (long)r*m->in, m->in, (uint8_t *)(w->bytes + (long)r*n), step + r, zero + r);
#define AT(b) ((b)*rows/blocks) /* where block b of the rows begins: they differ by one row at most */
        if (packed)
            for (int b = 0; b < blocks; b++)
                pack(words + (long)AT(b)*n, AT(b + 1) - AT(b), n, w->sides + (long)AT(b)*n);
        int share = threads > 1 && (long)m->out*m->in >= 1 << 18;
        _Pragma("omp parallel for num_threads(threads) if(share)")
        for (int p = 0; p < panels; p++) for (int b = 0; b < blocks; b++) {
            int first = p*PANEL, cols = m->out - first < PANEL ? m->out - first : PANEL, r = AT(b);
            const float *panel = (const float *)m->w + (long)first*m->in;
            const Word *at = from + (long)r*n;
            float *to = y + (long)r*m->out + first;
#define CASE(R, ROW, NEXT) case R: \
            if (m->scale) panel8(R, m, first, at, ROW, NEXT, step + r, zero + r, to, cols, add); \
            else panel32(0, R, panel, (const float *)at, ROW, NEXT, n, to, m->out, cols, add); \
            break;
            switch (AT(b + 1) - r) {
                CASE(1, n, 1) CASE(2, n, 1) CASE(3, n, 1)
#ifdef __AVX512BW__
                CASE(4, n, 1) CASE(5, n, 1) /* where they are; more of them packed */
                CASE(6, 1, 6) CASE(7, 1, 7) CASE(8, 1, 8) CASE(9, 1, 9) CASE(10, 1, 10) CASE(11, 1, 11) CASE(12, 1, 12)
#endif
            }
        }
    }
}

/* for tests */
void multiply(const Matrix *m, const float *x, int k, float *y, Word *bytes, Word *sides, int threads) {
    product(m, x, k, y, 0, &(Rows){ bytes, sides }, threads);
}

/* ------------------------------------- attention ------------------------------------- */

/* A decoder's. Each row is summed in the same order, however many come at once. Of a layer there are the keys of
   each head and then its values, in groups of 16 tokens: keys feature by feature, values token by token. In int8 a
   group begins with its tokens' scales. */

enum { GROUP = 16, SPAN = GROUP/WIDTH };
#ifdef __AVX512BW__
enum { BESIDE = 4 }; /* rows that read a key together */
#else
enum { BESIDE = 1 };
#endif

static long up(long n) { return (n + GROUP - 1)/GROUP*GROUP; }
static long size(int kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }
static long scales(int kind) { return kind == INT8 ? GROUP*sizeof(float) : 0; }
static long group_bytes(int kind, int d) { return GROUP*size(kind)*d + scales(kind); }
static long plane(int kind, int d, long room) { return room/GROUP*group_bytes(kind, d); } /* of a head */
static long layer_bytes(const Stack *s, long room) { return 2*s->heads*plane(s->kv, s->dk, room); }
long kv_bytes(const Stack *s, long room) { return s->layers*layer_bytes(s, room); }

/* all that lies in a memory for `was` tokens, into one for `room` */
void move_kv(const Stack *s, const char *from, long was, char *to, long room) {
    long size = plane(s->kv, s->dk, was), next = plane(s->kv, s->dk, room);
    for (long i = 0; i < 2L*s->layers*s->heads; i++) memcpy(to + i*next, from + i*size, size);
}

INLINE uint16_t to_bf16(float x) { /* to the nearest, of two as near to the even one */
    union { float f; uint32_t i; } u = { x };
    return x != x ? 0x7fc0 : (u.i + 0x7fff + (u.i >> 16 & 1)) >> 16;
}

/* d numbers of token t into its group, number i to the place `first` + i*`step` */
INLINE void keep(int kind, const float *x, int d, char *group, int t, const long first, const long step) {
    if (kind == FP32) for (int i = 0; i < d; i++) ((float *)group)[first + i*step] = x[i];
    else if (kind == BF16) for (int i = 0; i < d; i++) ((uint16_t *)group)[first + i*step] = to_bf16(x[i]);
    else {
        float top = 1e-30f, bad = 0, high = largest(x, d, 1), low = largest(x, d, -1);
        int8_t *to = (int8_t *)group + scales(INT8) + first;
        for (int i = 0; i < d; i++) bad += x[i]*0; /* NaN if one of them is no number */
        top = high > top ? high : top;
        top = low > top ? low : top;
        ((float *)group)[t] = top/127 + bad;
        for (int i = 0; i < d; i++) to[i*step] = bad != bad ? 0 : (int)rintf(x[i]*(127/top));
    }
}

/* k rows of keys and values, `step` apart, to `start` and after in a layer's memory for `room` */
static void store(const Stack *s, const float *x, long step, long k, char *kv, long room, long start) {
    int d = s->dk;
    long in = (long)s->heads*d, each = plane(s->kv, d, room), bytes = group_bytes(s->kv, d);
    for (long at = start, end; at < start + k; at = end) { /* group by group, whose head stays in the first cache */
        end = at/GROUP*GROUP + GROUP < start + k ? at/GROUP*GROUP + GROUP : start + k;
        for (int head = 0; head < s->heads; head++) for (long t = at; t < end; t++) {
            char *key = kv + head*each + t/GROUP*bytes;
            const float *from = x + (t - start)*step + (long)head*d;
            keep(s->kv, from, d, key, t % GROUP, t % GROUP, GROUP);
            keep(s->kv, from + in, d, key + s->heads*each, t % GROUP, t % GROUP*d, 1);
        }
    }
}

INLINE float read_one(const int kind, const char *at, long i) {
    if (kind == FP32) return *(const float *)(at + i*4);
    if (kind == INT8) return *(const int8_t *)(at + i);
    union { uint32_t i; float f; } u = { (uint32_t)*(const uint16_t *)(at + i*2) << 16 };
    return u.f;
}

/* WIDTH numbers from the i-th on. (GCC 12 converts its own vectors of bytes one by one.) */
INLINE V read(const int kind, const char *at, long i) {
    if (kind == FP32) return *(const V *)(at + i*4);
#if defined(__AVX512BW__)
    if (kind == INT8) return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(at + i))));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(at + i*2))), 16);
#elif defined(__AVX2__)
    if (kind == INT8) return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(at + i))));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(at + i*2))), 16);
#else
    float x[WIDTH];
    V v;
    for (int j = 0; j < WIDTH; j++) x[j] = read_one(kind, at, i + j);
    memcpy(&v, x, sizeof v);
    return v;
#endif
}

/* the scores of T groups of keys, of R rows q */
INLINE void score_(const int kind, const int R, const int T, const float *q, long row, const char *key, int d,
                   float *s, long slot) {
    long bytes = group_bytes(kind, d);
    V acc[R][T*SPAN];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < T*SPAN; p++) acc[r][p] = (V){0};
    for (int i = 0; i < d; i++) UNROLL for (int p = 0; p < T*SPAN; p++) {
        V k = read(kind, key + p/SPAN*bytes + scales(kind), i*GROUP + p % SPAN*WIDTH);
        UNROLL for (int r = 0; r < R; r++) acc[r][p] += q[r*row + i]*k;
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < T*SPAN; p++) {
        if (kind == INT8) acc[r][p] *= ((const V *)(key + p/SPAN*bytes))[p % SPAN];
        ((V *)(s + r*slot))[p] = acc[r][p];
    }
}

/* of n keys, some groups at once, so that a sum need not wait for itself */
INLINE void score(const int kind, const int R, const float *q, long row, const char *key, long n, int d, float *s, long slot) {
    const int T = 32/WIDTH*(R == 1 ? 2 : 1);
    long t = 0, bytes = group_bytes(kind, d);
    for (; t + T*GROUP <= n; t += T*GROUP, key += T*bytes) score_(kind, R, T, q, row, key, d, s + t, slot);
    for (; t < n; t += GROUP, key += bytes) score_(kind, R, 1, q, row, key, d, s + t, slot);
}

/* n scores to weights, of values with scales these times the scales; returns the sum without them */
static float weigh(float *restrict s, long n, const float *bias, const float *mask, const char *value, long bytes) {
    long most = up(n);
    V total = {0};
    if (bias) for (long t = 0; t < n; t++) s[t] += bias[t];
    if (mask) for (long t = 0; t < n; t++) s[t] += mask[t];
    for (long t = n; t < most; t++) s[t] = -INFINITY;
    float top = largest(s, most, 1);
    for (long t = 0; t < most; t += WIDTH) total += *(V *)(s + t) = exps(*(V *)(s + t) - top);
    if (value) for (long t = 0; t < most; t += GROUP, value += bytes)
        UNROLL for (int p = 0; p < SPAN; p++) ((V *)(s + t))[p] *= ((const V *)value)[p];
    return add(total);
}

/* the values of n tokens in their weights, over the sum of these: `wide` numbers of R rows, of which each sees
   `more` tokens more than the one before it (0 or 1) */
INLINE void mix(const int kind, const int wide, const int R, const float *s, long slot, const char *value, long n, int more,
                int d, const float *sum, float *out, long in) {
    V o[R][wide/WIDTH];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < wide/WIDTH; p++) o[r][p] = (V){0};
    for (long t = 0; t < n; t++) {
        const char *from = value + t/GROUP*group_bytes(kind, d) + scales(kind);
        UNROLL for (int p = 0; p < wide/WIDTH; p++) {
            V v = read(kind, from, t % GROUP*d + p*WIDTH);
            UNROLL for (int r = 0; r < R; r++) o[r][p] += s[r*slot + t]*v;
        }
    }
    UNROLL for (int r = 1; r < R; r++) for (long t = n; t < n + r*more; t++) { /* what this row sees besides */
        const char *from = value + t/GROUP*group_bytes(kind, d) + scales(kind);
        UNROLL for (int p = 0; p < wide/WIDTH; p++) o[r][p] += s[r*slot + t]*read(kind, from, t % GROUP*d + p*WIDTH);
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < wide/WIDTH; p++) ((V *)(out + r*in))[p] = o[r][p]/sum[r];
}

/* as `mix`, for heads of any width: one row, with room for the sum behind its scores */
INLINE void mix_any(const int kind, const float *s, const char *value, long n, int d, float sum, float *o, float *out) {
    for (int i = 0; i < d; i++) o[i] = 0;
    for (long t = 0; t < n; t++) {
        const char *from = value + t/GROUP*group_bytes(kind, d) + scales(kind);
        for (int i = 0; i < d; i++) o[i] += s[t]*read_one(kind, from, t % GROUP*d + i);
    }
    for (int i = 0; i < d; i++) out[i] = o[i]/sum;
}

/* One head of at most `rows` rows q, `row` apart; returns how many were done. The first sees n keys, each other one
   `more` than the one before it; `s` has room for the scores of all, `slot` apart, and for a sum of d. */
INLINE int attend_(const int kind, int rows, const float *q, long row, const char *key, const char *value, long n, int more,
                   int d, const float *bias, const float *mask, float *s, long slot, float *out, long in) {
    int many = rows >= BESIDE && BESIDE > 1 && d % 32 == 0;
    float sum[BESIDE];
    if (many) score(kind, BESIDE, q, row, key, n + more*(BESIDE - 1), d, s, slot);
    else score(kind, 1, q, row, key, n, d, s, slot);
    for (int r = 0; r < (many ? BESIDE : 1); r++)
        sum[r] = weigh(s + r*slot, n + r*more, bias ? bias - r : 0, mask, kind == INT8 ? value : 0, group_bytes(kind, d));
#define MIX(WIDE, R) mix(kind, WIDE, R, s, slot, value + i*size(kind), n, more, d, sum, out + i, in)
    if (d % 64 == 0) for (int i = 0; i < d; i += 64) if (many) MIX(64, BESIDE); else MIX(64, 1);
    else if (d % 32 == 0) for (int i = 0; i < d; i += 32) if (many) MIX(32, BESIDE); else MIX(32, 1);
    else mix_any(kind, s, value, n, d, sum[0], s + up(n), out);
    return many ? BESIDE : 1;
}

static int attend(int kind, int rows, const float *q, long row, const char *key, const char *value, long n, int more,
                  int d, const float *bias, const float *mask, float *s, long slot, float *out, long in) {
#define SEE(K) attend_(K, rows, q, row, key, value, n, more, d, bias, mask, s, slot, out, in)
    return kind == FP32 ? SEE(FP32) : kind == BF16 ? SEE(BF16) : SEE(INT8);
}

/* --------------------------------------- blocks --------------------------------------- */

/* Many rows at once: an encoder's. Keys and values of a head lie in panels as weights do. */

enum { QUERIES = 48, KEYS = 192 }; /* whose scores are made at a time */

static int in_pairs(int kind) { return PAIRS && kind != FP32; }
static long whole(long n) { return (n + PANEL - 1)/PANEL*PANEL; }
static long kv_floats(long n, int heads, int d) { return heads*whole(n)*(d + whole(d)); }
static long block_floats(int d) { return QUERIES*(d + 1 + KEYS + whole(d)); } /* that a thread works in */

/* number i of a panel, of the j-th output; with `two` two inputs are side by side, in bf16 */
INLINE void put_panel(const int two, float *panel, long i, int j, float x) {
    if (two) ((uint16_t *)panel)[(i/2*PANEL + j)*2 + i % 2] = to_bf16(x);
    else panel[i*PANEL + j] = x;
}

/* keys and values of the rows t to `end` of n rows x, which are `row` apart: of each head the keys in panels of 32
   tokens, feature by feature, and the values in panels of 32 features, token by token. What lies behind them is not
   used, but for what makes a pair whole: these are zeros. */
INLINE void store_panels_(const int two, const float *x, long row, long n, int heads, int d, float *kv, long t, long end) {
    long room = whole(n), in = (long)heads*d, size = kv_floats(n, 1, d);
    for (long stop; t < end; t = stop) { /* panel by panel, whose head stays in the first cache */
        stop = t/PANEL*PANEL + PANEL < end ? t/PANEL*PANEL + PANEL : end;
        for (int head = 0; head < heads; head++) for (long j = t; j < stop; j++) {
            float *key = kv + head*size + j/PANEL*PANEL*d, *value = kv + head*size + room*d;
            const float *from = x + j*row + (long)head*d;
            for (int i = 0; i < d; i++) put_panel(two, key, i, j % PANEL, from[i]);
            if (two && d % 2) put_panel(two, key, d, j % PANEL, 0);
            for (int p = 0; p < d; p += PANEL, value += room*PANEL) {
                int wide = d - p < PANEL ? d - p : PANEL;
                for (int i = 0; i < wide; i++) put_panel(two, value, j, i, from[in + p + i]);
                if (two && j == n - 1 && n % 2) for (int i = 0; i < wide; i++) put_panel(two, value, n, i, 0);
            }
        }
    }
}

static void store_panels(int two, const float *x, long row, long n, int heads, int d, float *kv, long t, long end) {
    if (two) store_panels_(1, x, row, n, heads, d, kv, t, end);
    else store_panels_(0, x, row, n, heads, d, kv, t, end);
}

/* scores s of n keys to exp(s - top), where `top` is the largest that was met; what was summed up
   before, `sum` and o (d), is brought down to the new top. With `two` the results are in bf16. */
INLINE void soften(const int two, float *s, int n, const float *bias, const float *mask, float *top, float *sum,
                   float *o, int d) {
    int t = 0, most = (n + WIDTH - 1)/WIDTH*WIDTH;
    V total = {0}, m = total + *top;
    for (; t + WIDTH <= n; t += WIDTH) { /* whole vectors */
        V *z = (V *)(s + t);
        *z += *(const V *)(bias + t);
        if (mask) *z += *(const V *)(mask + t);
        m = larger(*z, m);
    }
    float now = fold(m);
    for (; t < n; t++) {
        s[t] += bias[t];
        if (mask) s[t] += mask[t];
        now = s[t] > now ? s[t] : now;
    }
    for (; t < most; t++) s[t] = -INFINITY;
    for (t = 0; t < most; t += WIDTH) {
        V e = exps(*(V *)(s + t) - now);
        total += e;
        if (two) halve(e, (uint16_t *)s + t);
        else *(V *)(s + t) = e;
    }
    if (now != *top) {
        float down = fast_exp(*top - now);
        *sum *= down;
        for (int i = 0; i < d; i++) o[i] *= down;
    }
    *sum += add(total);
    *top = now;
}

/* one head of at most QUERIES rows q, `row` apart, over all n keys; `bias` is the first row's, and
   `work` has room for block_floats. With `two` all products are of bf16. */
INLINE void attend_block_(const int two, const float *q, long row, int rows, const float *key, const float *value, long n,
                          int d, const float *bias, const float *mask, float *work, float *out, long in) {
    long room = whole(n), wide = whole(d);
    int most = (rows + MOST - 1)/MOST*MOST, inputs = two ? (d + 1)/2 : d;
    float *packed = work, *s = packed + QUERIES*(d + 1), *o = s + QUERIES*KEYS, top[QUERIES], sum[QUERIES];
    for (int r = 0; r < most; r++) { /* in groups of MOST; rows that are none are zeros */
        float *to = packed + r/MOST*MOST*inputs + r % MOST;
        for (int i = 0; i < d + d % 2*two; i++) {
            float x = r < rows && i < d ? q[r*row + i] : 0;
            if (two) ((uint16_t *)(to + i/2*MOST))[i % 2] = to_bf16(x);
            else to[i*MOST] = x;
        }
        top[r] = -FLT_MAX;
        sum[r] = 0;
    }
    memset(o, 0, most*wide*sizeof(float));
    for (long t = 0; t < n; t += KEYS) {
        int keys = n - t < KEYS ? n - t : KEYS;
        for (int c = 0; c < keys; c += PANEL) for (int r = 0; r < rows; r += MOST)
            panel32(two, MOST, key + (t + c)*d, packed + r*inputs, 1, MOST, inputs, s + r*KEYS + c, KEYS, PANEL, 0);
        for (int r = 0; r < rows; r++)
            soften(two, s + r*KEYS, keys, bias - r + t, mask ? mask + t : 0, top + r, sum + r, o + r*wide, wide);
        for (int c = 0; c < wide; c += PANEL) for (int r = 0; r < rows; r += MOST)
            panel32(two, MOST, value + c*room + t*PANEL/(1 + two), s + r*KEYS, KEYS, 1, (keys + two)/(1 + two),
                    o + r*wide + c, wide, PANEL, 1);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < d; i++) out[r*in + i] = o[r*wide + i]/sum[r];
}

static void attend_block(int two, const float *q, long row, int rows, const float *key, const float *value, long n,
                         int d, const float *bias, const float *mask, float *work, float *out, long in) {
    if (two) attend_block_(1, q, row, rows, key, value, n, d, bias, mask, work, out, in);
    else attend_block_(0, q, row, rows, key, value, n, d, bias, mask, work, out, in);
}

/* n tokens that all see each other: from queries q (n, 3 in) and keys and values kv to out (n, in), with
   the bias of each head in a line; `slot` of `work` belong to one thread */
static void attend_all(int two, const float *q, long n, int heads, int d, const float *line, long far, const float *mask,
                       const float *kv, float *work, long slot, float *out, int threads) {
    long in = (long)heads*d;
    _Pragma("omp parallel for collapse(2) num_threads(threads) if(threads > 1 && n > 8)")
    for (int head = 0; head < heads; head++) for (long r = 0; r < n; r += QUERIES) {
        const float *key = kv + head*kv_floats(n, 1, d), *bias = line + head*(2*far - 1) + far - 1 - r;
        attend_block(two, q + 3*r*in + head*d, 3*in, n - r < QUERIES ? n - r : QUERIES, key, key + whole(n)*d, n, d,
                     bias, mask, work + omp_get_thread_num()*slot, out + r*in + head*d, in);
    }
}

/* for tests */
void attention(int kind, const float *q, long n, int heads, int d, const float *line, long far, const float *mask,
               float *kv, float *work, long slot, float *out, int threads) {
    long in = (long)heads*d;
    store_panels(in_pairs(kind), q + in, 3*in, n, heads, d, kv, 0, n);
    attend_all(in_pairs(kind), q, n, heads, d, line, far, mask, kv, work, slot, out, threads);
}

/* ---------------------------------------- feed ---------------------------------------- */

INLINE void activate_(const int act, const int gated, int k, int ff, float *h) {
    for (int r = 0; r < k; r++) {
        const float *a = h + (long)r*ff*(1 + gated);
        float *to = h + (long)r*ff;
        _Pragma("GCC ivdep")
        for (int i = 0; i < ff; i++) { /* in place */
            float x = a[i], y;
            if (act == 0) y = x < 0 ? 0 : x;
            else if (act == 1) y = x/(1 + fast_exp(-1.5957691216f*(x + .044715f*x*x*x)));
            else if (act == 2) y = x/(1 + fast_exp(-x));
            else y = .5f*x*(1 + erff(x*.70710678f));
            to[i] = gated ? y*a[i + ff] : y;
        }
    }
}

/* (k, ff or 2 ff) to (k, ff), in place */
static void activate(const Stack *s, int k, float *h) {
#define ACT(A) case A: \
    if (s->gated) activate_(A, 1, k, s->ff, h); \
    else activate_(A, 0, k, s->ff, h); \
    break;
    switch (s->act) { ACT(0) ACT(1) ACT(2) ACT(3) }
}

/* --------------------------------------- memory --------------------------------------- */

typedef struct { long f, n, bytes, sides; } Own; /* how much of each of these belongs to a thread */

typedef struct {
    float *x, *h, *q, *f; /* rows: the sum that goes through the layers, and what they make of it */
    float *kv, *n;        /* of an encoder: keys and values of a layer; normed rows */
    float *z;             /* logits of one row */
    float *s; long slot;  /* scores: of a thread `slot` */
    Rows rows;
    Own own;
} Work;

#ifdef __SANITIZE_ADDRESS__ /* pieces lie apart, and what lies between them is forbidden */
#include <sanitizer/asan_interface.h>
enum { GAP = 16 };
#else
enum { GAP = 0 };
#define ASAN_POISON_MEMORY_REGION(at, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

static long max_of(long a, long b) { return a > b ? a : b; }

/* floats that k rows with at most `keys` keys need; with `memory`, the pieces of it as well */
static long carve(const Stack *s, long k, long keys, long words, int threads,
                  float *memory, Work *w) {
    long used = 0, in = (long)s->heads*s->dk, wide = max_of(max_of(s->d, in), s->ff);
    long rows = k < ROWS ? k : ROWS; /* that a product, and the feed-forward part, take at a time */
    long slot = s->causal ? BESIDE*up(keys) + up(s->dk) : up(block_floats(s->dk));
    Own own = { up(rows*s->ff*(1 + s->gated)), s->causal ? 0 : up(rows*s->d), up(rows*((wide + 3)/4)), up(rows*wide) };
#define TAKE(name, n) do { \
        long have = used, take = ((n) + 15)/16*16; \
        used += take + GAP; \
        if (!memory) break; \
        w->name = (void *)(memory + have); \
        ASAN_POISON_MEMORY_REGION(memory + have + (n), (take + GAP - (n))*sizeof(float)); \
    } while (0)
    TAKE(x, k*s->d);
    TAKE(h, k*max_of(s->d, in));
    TAKE(q, 3*k*in);
    TAKE(f, own.f*threads);
    TAKE(n, own.n*threads);
    TAKE(kv, s->causal ? 0 : kv_floats(k, s->heads, s->dk));
    TAKE(z, words);
    TAKE(s, slot*threads);
    TAKE(rows.bytes, own.bytes*threads);
    TAKE(rows.sides, own.sides*threads);
    if (memory) {
        w->slot = slot;
        w->own = own;
    }
    return used;
}

/* floats for a text: for its source of n tokens, and for passes over k tokens of up to `room` */
long scratch(const Stack *encoder, const Stack *decoder, long n, long k, long room, long vocab,
             int threads) {
    long read = carve(encoder, n, n, vocab, threads, 0, 0);
    long crossed = carve(decoder, n, n, vocab, threads, 0, 0);
    long passed = carve(decoder, k, max_of(room, n), vocab, threads, 0, 0);
    return max_of(max_of(read, crossed), passed);
}

enum { LONGEST = 1 << 24 }; /* rows of a pass: the products count them as int */

static int prepare(const Stack *s, const Text *c, long k, long keys, long words, Work *w) {
    if (k < 1 || k > LONGEST || c->threads < 1 || !c->work) return BAD_SIZE;
    if (carve(s, k, keys, words, c->threads, 0, 0) > c->floats) return BAD_SIZE;
    ASAN_UNPOISON_MEMORY_REGION(c->work, c->floats*sizeof(float));
    carve(s, k, keys, words, c->threads, c->work, w);
    return DONE;
}

/* --------------------------------------- layers --------------------------------------- */

/* k rows q, `row` apart, look at the first n keys in a layer's memory for `room`, each row at `more` than the one
   before it; what they see goes to h (k, in) */
static void look(const Stack *s, const Text *c, const Work *w, const float *q, long row, long k, const char *kv, long room,
                 long n, int more, float *h) {
    int d = s->dk, t = c->threads;
    long in = (long)s->heads*d, each = plane(s->kv, d, room), slot = up(n + more*(k - 1));
    _Pragma("omp parallel for collapse(2) num_threads(t) if(t > 1 && k*n*in >= 1 << 18)")
    for (int head = 0; head < s->heads; head++) for (long first = 0; first < k; first += BESIDE) {
        const char *key = kv + head*each;
        float *scores = w->s + omp_get_thread_num()*w->slot;
        long end = k < first + BESIDE ? k : first + BESIDE;
        for (long r = first, i = (long)head*d; r < end;) {
            const float *bias = more ? c->line + head*(2*c->far - 1) + c->far - n - r : 0;
            r += attend(s->kv, end - r, q + r*row + i, row, key, key + s->heads*each, n + r*more, more, d,
                        bias, more ? 0 : c->mask, scores, slot, h + r*in + i, in);
        }
    }
}

/* layer l of a part: keys and values of its rows q (k, 3 in) go into its text, what they see there to h (k, in) */
static void see_text(const Stack *s, const Part *part, const Work *w, int l, const float *q, float *h) {
    const Text *c = part->text;
    long in = (long)s->heads*s->dk;
    char *kv = c->kv + l*layer_bytes(s, c->room);
    store(s, q + in, 3*in, part->k, kv, c->room, part->at);
    look(s, c, w, q, 3*in, part->k, kv, c->room, part->at + 1, 1, h);
}

/* for tests */
void recall(const Stack *s, const Part *part, float *work, long slot, const float *q, float *h) {
    see_text(s, part, &(Work){ .s = work, .slot = slot }, 0, q, h);
}

/* what they see of the source: from q (k, in) to h (k, in) */
static void see_source(const Stack *s, const Part *part, const Work *w, int l, const float *q, float *h) {
    const Text *c = part->text;
    look(s, c, w, q, (long)s->heads*s->dk, part->k, c->cross + l*layer_bytes(s, c->source), c->source, c->n, 0, h);
}

/* rows r to r + k go through the feed-forward part of layer y */
static void feed(const Stack *s, const Layer *y, const Work *w, long r, int k, float *h, int threads) {
    norm(w->x + r*s->d, y->feed_norm, k, s->d, s->eps, h);
    product(&y->wi, h, k, w->f, 0, &w->rows, threads);
    activate(s, k, w->f);
    product(&y->wo, w->f, k, w->x + r*s->d, 1, &w->rows, threads);
}

/* all layers of a decoder, over the k rows of n parts */
static void decoder_layers(const Stack *s, const Text *c, const Work *w, int k, const Part *parts, int n) {
    int d = s->d, in = s->heads*s->dk, t = c->threads;
    float *x = w->x, *h = w->h, *q = w->q;
    for (int l = 0; l < s->layers; l++) {
        const Layer *y = s->layer + l;
        long r = 0;
        norm(x, y->norm, k, d, s->eps, h);
        product(&y->qkv, h, k, q, 0, &w->rows, t);
        for (const Part *p = parts; p < parts + n; r += p++->k) see_text(s, p, w, l, q + 3*r*in, h + r*in);
        product(&y->o, h, k, x, 1, &w->rows, t);
        norm(x, y->cross_norm, k, d, s->eps, h);
        product(&y->cross_q, h, k, q, 0, &w->rows, t);
        r = 0;
        for (const Part *p = parts; p < parts + n; r += p++->k) see_source(s, p, w, l, q + r*in, h + r*in);
        product(&y->cross_o, h, k, x, 1, &w->rows, t);
        for (r = 0; r < k; r += ROWS) feed(s, y, w, r, k - r < ROWS ? k - r : ROWS, h, t);
    }
}

/* A source's rows in pieces. A thread takes one after the other and keeps what it makes of it in its caches; it waits
   for the rest where a token must see the others. Pieces of very few rows share the panels of a product instead. */
enum { PIECE = 6 };

typedef struct { /* a piece, with the working memory of its thread, and how many threads share its products */
    Work w;
    long r, end;
    int threads;
} Piece;

static Piece piece(const Work *w, long k, long p, long n, int split, int threads) {
    Piece m = { *w, p*k/n, (p + 1)*k/n, split ? 1 : threads };
    long t = split ? omp_get_thread_num() : 0;
    m.w.f += t*w->own.f;
    m.w.n += t*w->own.n;
    m.w.rows.bytes += t*w->own.bytes;
    m.w.rows.sides += t*w->own.sides;
    return m;
}

/* DO(m) for each piece m of k rows. (A region within another one would make its threads anew, even if that has one.) */
#define PIECES(DO) { \
    long n = (k + ROWS - 1)/ROWS; \
    int split = t > 1 && k >= (long)t*PIECE; \
    if (split) { \
        n = (n + t - 1)/t*t; \
        _Pragma("omp parallel for num_threads(t) schedule(static)") \
        for (long p = 0; p < n; p++) { const Piece m = piece(w, k, p, n, 1, t); DO; } \
    } else for (long p = 0; p < n; p++) { const Piece m = piece(w, k, p, n, 0, t); DO; } \
}

/* queries, keys and values of a piece of the k rows of an encoder's layer y */
static void ask(const Stack *s, const Layer *y, const Piece *m, long k) {
    long rows = m->end - m->r, in = (long)s->heads*s->dk;
    norm(m->w.x + m->r*s->d, y->norm, rows, s->d, s->eps, m->w.n);
    product(&y->qkv, m->w.n, rows, m->w.q + 3*m->r*in, 0, &m->w.rows, m->threads);
    store_panels(in_pairs(s->kv), m->w.q + in, 3*in, k, s->heads, s->dk, m->w.kv, m->r, m->end);
}

/* what a piece makes of what it saw */
static void answer(const Stack *s, const Layer *y, const Piece *m) {
    long rows = m->end - m->r, in = (long)s->heads*s->dk;
    product(&y->o, m->w.h + m->r*in, rows, m->w.x + m->r*s->d, 1, &m->w.rows, m->threads);
    feed(s, y, &m->w, m->r, rows, m->w.n, m->threads);
}

/* all layers of an encoder, over the k rows of text c */
static void encoder_layers(const Stack *s, const Text *c, const Work *w, long k) {
    int t = c->threads;
    for (const Layer *y = s->layer; y < s->layer + s->layers; y++) {
        PIECES(ask(s, y, &m, k))
        attend_all(in_pairs(s->kv), w->q, k, s->heads, s->dk, c->line, c->far, c->mask, w->kv, w->s, w->slot, w->h, t);
        PIECES(answer(s, y, &m))
    }
}

/* --------------------------------------- source --------------------------------------- */

/* one of the ids that Python hands over; it is read once, so what was checked is what is used */
static int read_id(const int64_t *ids, long i, long below, int64_t *id) {
    memcpy(id, ids + i, sizeof *id);
    return *id >= 0 && *id < below;
}

static int embed(const Stack *s, int k, const int64_t *tokens, float *x) {
    int64_t token;
    for (int r = 0; r < k; r++) {
        if (!read_id(tokens, r, s->words, &token)) return BAD_TOKEN;
        memcpy(x + (long)r*s->d, s->embedding + token*s->d, s->d*sizeof(float));
    }
    return DONE;
}

/* the encoder's last hidden state of k tokens, into w->x */
static int encode(const Stack *s, const Text *c, Work *w, long k, const int64_t *tokens) {
    if (!c->line || !tokens || c->far < k || prepare(s, c, k, k, c->vocab, w)) return BAD_SIZE;
    if (embed(s, k, tokens, w->x)) return BAD_TOKEN;
    encoder_layers(s, c, w, k);
    norm(w->x, s->norm, k, s->d, s->eps, w->x);
    return DONE;
}

/* a piece's keys and values for every layer of a decoder, from the encoder outputs x */
static void remember(const Stack *s, const Text *c, const Piece *m, const float *x) {
    long rows = m->end - m->r, in = (long)s->heads*s->dk;
    float *kv = m->w.q + 2*m->r*in;
    for (int l = 0; l < s->layers; l++) {
        product(&s->layer[l].cross_kv, x + m->r*s->d, rows, kv, 0, &m->w.rows, m->threads);
        store(s, kv, 2*in, rows, c->cross + l*layer_bytes(s, c->source), c->source, m->r);
    }
}

static int cross(const Stack *s, const Text *c, const float *x) {
    Work whole, *w = &whole;
    long k = c->n;
    int t = c->threads;
    if (!x || !c->cross || c->source < c->n || c->source % GROUP) return BAD_SIZE;
    if (prepare(s, c, k, k, c->vocab, w)) return BAD_SIZE;
    PIECES(remember(s, c, &m, x))
    return DONE;
}

/* reads a source: its ids, or encoder outputs that are there already */
long read_source(const Stack *encoder, const Stack *decoder, const Text *c, const float *line, long far,
                 const int64_t *tokens, const float *encoded) {
    Work w;
    Text source = *c; /* with the encoder's position biases */
    source.line = line;
    source.far = far;
    if (!encoded) {
        int why = encode(encoder, &source, &w, c->n, tokens);
        if (why) return why;
        encoded = w.x; /* the first piece: of the decoder's, too, which does not use it here */
    }
    return cross(decoder, c, encoded);
}

/* --------------------------------------- passes --------------------------------------- */

/* the logits z (all their `last`, ids) after the last tokens of n parts; c has what these share */
static int pass(const Stack *s, const Text *c, Work *w, const Part *parts, int n, float *z) {
    Matrix head = s->head;
    const Part *p;
    long k = 0, last = 0, d = s->d, v = head.out = c->vocab;
    for (p = parts; p < parts + n; k += p++->k)
        if (embed(s, p->k, p->tokens, w->x + k*d)) return BAD_TOKEN;
    decoder_layers(s, c, w, k, parts, n);
    for (p = parts, k = 0; p < parts + n; last += p++->last) {
        k += p->k;
        norm(w->x + (k - p->last)*d, s->norm, p->last, d, s->eps, w->h + last*d);
    }
    product(&head, w->h, last, z, 0, &w->rows, c->threads);
    for (long r = 0; r < last; r++)
        for (int i = 0; i < c->nevers; i++) z[r*v + c->never[i]] = -INFINITY;
    return DONE;
}

/* the best token of z, its probability, and ln of the sum of exponentials */
static float judge(const float *z, int v, int64_t *token, float *confidence) {
    float top = largest(z, v, 1), sum = exp_sum(z, v, top);
    int at = 0;
    while (at < v - 1 && z[at] != top) at++;
    *token = at;
    *confidence = 1/sum;
    return top + logf(sum);
}

/* whether a part fits into what its text has */
static int fits(const Stack *s, const Part *part, long vocab) {
    const Text *c = part->text;
    long k = part->k, at = part->at, more = part->more;
    if (!c || !part->tokens || !c->kv || !c->cross || !c->line) return 0;
    if (k < 1 || k > LONGEST || part->last < 1 || part->last > k) return 0;
    if (at < 0 || more < 0 || more > c->room) return 0;
    if (k + more > c->room - at || k + more > c->far - at || c->room % GROUP) return 0;
    if (c->n < 1 || c->n > c->source || c->source % GROUP) return 0;
    return c->vocab == vocab && vocab >= 1 && vocab <= s->head.out;
}

/* whether n parts fit; the pieces of the working memory of c */
static int ready(const Stack *s, const Text *c, const Part *parts, long n, Work *w) {
    long k = 0, keys = 0;
    for (const Part *p = parts; p < parts + n; k += p++->k) {
        if (!fits(s, p, c->vocab) || p->k > LONGEST - k) return BAD_SIZE;
        keys = max_of(keys, max_of(p->text->room, p->text->n));
    }
    return prepare(s, c, k, keys, n*c->vocab, w);
}

long decode(const Stack *s, const Text *c, long k, const int64_t *tokens, long at, long last,
            float *z) {
    Work w;
    Part part = { c, tokens, k, at, last, 0 };
    if (!z || ready(s, c, &part, 1, &w)) return BAD_SIZE;
    return pass(s, c, &w, &part, 1, z);
}

/* the scores of g + 1 rows of z, and the distances of g drafted tokens; returns how many of these stay: all
   before the first that is farther than `farthest` and, unless `strict`, not the best token */
static long compare(const float *z, int v, long g, const int64_t *draft, float farthest, int strict,
                    int64_t *token, float *confidence, float *nll) {
    int64_t drafted;
    long kept = 0;
    for (long r = 0; r <= g; r++, z += v) {
        float lse = judge(z, v, token + r, confidence + r);
        if (r == g) break;
        if (!read_id(draft, r, v, &drafted)) return BAD_DRAFT;
        nll[r] = lse - z[drafted];
        int stays = nll[r] <= farthest || (!strict && drafted == token[r]);
        if (kept == r) kept += stays;
    }
    return kept;
}

static int known(const int64_t *draft, long g, long below) {
    int64_t id;
    for (long r = 0; r < g; r++) if (!read_id(draft, r, below, &id)) return 0;
    return 1;
}

long verify(const Stack *s, const Text *c, long k, const int64_t *tokens, long at, long g,
            const int64_t *draft, float farthest, int strict,
            float *z, int64_t *token, float *confidence, float *nll) {
    Work w;
    Part part = { c, tokens, k, at, g + 1, 0 };
    if (!z || !token || !confidence || !nll || (g && !draft)) return BAD_SIZE;
    if (g < 0 || g >= k || ready(s, c, &part, 1, &w)) return BAD_SIZE;
    if (!known(draft, g, c->vocab)) return BAD_DRAFT;
    if (pass(s, c, &w, &part, 1, z)) return BAD_TOKEN;
    return compare(z, c->vocab, g, draft, farthest, strict, token, confidence, nll);
}

/* `verify` for n texts in one pass: the last tokens of a part are its draft, one fewer than the positions that are
   wanted. What is found stands part after part; kept: how many of each draft stay */
long verify_rows(const Stack *s, const Text *c, long n, const Part *parts, float farthest, int strict,
                 float *z, int64_t *token, float *confidence, float *nll, long *kept) {
    Work w;
    if (!z || !token || !confidence || !nll || !kept || !parts) return BAD_SIZE;
    if (ready(s, c, parts, n, &w)) return BAD_SIZE;
    for (const Part *p = parts; p < parts + n; p++)
        if (!known(p->tokens + p->k - p->last + 1, p->last - 1, c->vocab)) return BAD_DRAFT;
    if (pass(s, c, &w, parts, n, z)) return BAD_TOKEN;
    for (const Part *p = parts; p < parts + n; p++, kept++) {
        long rows = p->last;
        *kept = compare(z, c->vocab, rows - 1, p->tokens + p->k - rows + 1, farthest, strict,
                        token, confidence, nll);
        if (*kept < 0) return BAD_DRAFT;
        z += rows*c->vocab;
        token += rows;
        confidence += rows;
        nll += rows;
    }
    return DONE;
}

enum { FALLBACK, EOS, CAP, ENDS }; /* why a draft ended */

/* counts a token that was found, and says whether the draft ends with it */
static void count(const Text *c, Draft *d, float least) {
    int64_t token = d->found[d->n];
    float p = d->confidence[d->n];
    if (p < least || p != p) {
        d->end = FALLBACK;
        return;
    }
    if (++d->n == d->most) d->end = CAP;
    for (int i = 0; i < c->n_ends; i++) if (token == c->ends[i]) d->end = EOS;
}

/* drafts for n texts: each step is one pass over those that go on. `parts` is room for as many */
long propose_rows(const Stack *s, const Text *c, long n, Draft *drafts, Part *parts, float least) {
    Work w;
    Draft *end = drafts + n, *d;
    for (d = drafts; d < end; d++) {
        if (d->most < 1 || !d->found || !d->confidence) return BAD_SIZE;
        d->n = 0;
        d->end = -1;
        d->part.last = 1;
        d->part.more = d->most - 1;
        parts[d - drafts] = d->part;
    }
    if (ready(s, c, parts, n, &w)) return BAD_SIZE;
    for (;;) {
        int going = 0;
        for (d = drafts; d < end; d++) if (d->end < 0) parts[going++] = d->part;
        if (!going) return DONE;
        if (pass(s, c, &w, parts, going, w.z)) return BAD_TOKEN;
        const float *z = w.z;
        for (d = drafts; d < end; d++) if (d->end < 0) {
            int64_t *token = d->found + d->n;
            judge(z, c->vocab, token, d->confidence + d->n);
            count(c, d, least);
            d->part = (Part){ d->part.text, token, 1, d->part.at + d->part.k, 1, 0 }; /* what the next step reads */
            z += c->vocab;
        }
    }
}

/* a draft of at most `most` tokens, into `found`; returns ENDS times their number plus why it ended */
long propose(const Stack *s, const Text *c, long k, const int64_t *tokens, long at, long most,
             float least, int64_t *found, float *confidence) {
    Draft draft = { { c, tokens, k, at, 1, 0 }, most, found, confidence, 0, 0 };
    Part part;
    long why = propose_rows(s, c, 1, &draft, &part, least);
    return why ? why : ENDS*draft.n + draft.end;
}
