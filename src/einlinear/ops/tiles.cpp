// Structured products on the CPU, in tiles of tokens that stay in cache.
//
// A tile holds a state feature-major: one row of `tile` tokens per feature. Then every contraction step, whatever its
// axes, is the same small matrix product on rows found by offset tables, and permuting axes costs nothing: it only
// changes the tables. Transposition happens where a tile is read from and written to token-major memory.
//
// A program (an array of int64, written by ops/tiles.py) describes the structure: see `Program` below. Offsets of
// states count rows, offsets of factors count entries.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MICRO_ROWS = 12;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, MICRO_ROWS = 6;
#else
constexpr int VECTOR_BYTES = 16, MICRO_ROWS = 8;
#endif

namespace {

using Index = int64_t;

template <class S>
struct Simd {
    typedef S type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(S)), may_alias));
    static constexpr int lanes = VECTOR_BYTES / sizeof(S);
};
template <class S>
using Vec = typename Simd<S>::type;
template <class S>
static inline Vec<S> load(const S* p) {
    return *(const Vec<S>*)p;
}
template <class S>
static inline void store(S* p, Vec<S> v) {
    *(Vec<S>*)p = v;
}

template <class S>
struct Buffer {  // aligned scratch memory, not initialised
    std::unique_ptr<S[]> memory;
    S* data;
    explicit Buffer(size_t count) : memory(new S[count + 64]) {
        data = (S*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63);
    }
};

// Fresh memory of many megabytes is mapped page by page as it is written, which costs as much as the arithmetic: ask
// for large pages. Memory that is mapped already is not affected.
static void expect(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    uintptr_t first = ((uintptr_t)data + page - 1) & ~(page - 1), last = ((uintptr_t)data + bytes) & ~(page - 1);
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// ---------------------------------------------------------------- program

struct Step {
    Index factor, batches, columns, rows, inner;  // counts of the step's matrix products and their sizes
    Index width_in, width_out;                    // rows of the states before and after
    // offsets: of batch, column and inner in the state before; of batch, column and row in the state after; of batch,
    // row and inner in the factor
    const Index *in_b, *in_c, *in_k, *out_b, *out_c, *out_r, *w_b, *w_r, *w_k;
    // what lies between two entries of in_k, out_r, w_r and w_k, or 0 where that is not always the same
    Index in_stride, out_stride, w_row, w_inner;
    Index pairs() const { return batches * columns; }
};

static Index term_states(const std::vector<Step>& term) {
    Index total = 0;
    for (auto& s : term) total += &s == &term.back() ? 0 : s.width_out;
    return total;
}

constexpr Index HEAVY_ENTRIES = 1 << 18, HEAVY_RATIO = 128;

struct Program {
    Index in_features, out_features;
    std::vector<std::vector<Step>> terms;
    Index width_in = 0, width_out = 0, widest = 0;

    explicit Program(const Index* p) {
        Index count = *p++;
        in_features = *p++, out_features = *p++;
        for (Index i = 0; i < count; i++) {
            std::vector<Step> term(*p++);
            for (Step& s : term) {
                s.factor = *p++, s.batches = *p++, s.columns = *p++, s.rows = *p++, s.inner = *p++;
                s.width_in = *p++, s.width_out = *p++;
                s.in_stride = *p++, s.out_stride = *p++, s.w_row = *p++, s.w_inner = *p++;
                const Index** tables[] = {&s.in_b,  &s.in_c, &s.in_k, &s.out_b, &s.out_c,
                                          &s.out_r, &s.w_b,  &s.w_r,  &s.w_k};
                const Index lengths[] = {s.batches, s.columns, s.inner, s.batches, s.columns,
                                         s.rows,    s.batches, s.rows,  s.inner};
                for (int t = 0; t < 9; t++) *tables[t] = p, p += lengths[t];
                widest = std::max({widest, s.width_in, s.width_out});
            }
            width_in = std::max(width_in, term.front().width_in);
            width_out = std::max(width_out, term.back().width_out);
            terms.push_back(std::move(term));
        }
    }
    const Step& first() const { return terms[0].front(); }
    const Step& last() const { return terms[0].back(); }
    Index states() const {  // rows of all intermediate states
        Index total = 0;
        for (auto& term : terms) total += term_states(term);
        return total;
    }
    Index factor_entries() const {
        Index total = 0;
        for (auto& term : terms)
            for (auto& s : term) total += s.batches * s.rows * s.inner;
        return total;
    }
    // Whether it is the factors that do not stay in cache, and not the states.
    bool heavy() const {
        Index entries = factor_entries();
        return entries > HEAVY_ENTRIES && entries > HEAVY_RATIO * (width_in + states() + width_out);
    }
};

// ---------------------------------------------------------------- transposition

template <class S, int Width, int Lane>
constexpr int interleaved(bool high) {
    constexpr int L = Simd<S>::lanes;
    // lane i of the low result: blocks of Width lanes, even ones of the first vector, then of the second
    return (Lane / Width) % 2 == 0 ? Lane + (high ? Width : 0) : Lane - Width + L + (high ? Width : 0);
}
template <class S, int Width, size_t... I>
static inline void exchange(Vec<S>& a, Vec<S>& b, std::index_sequence<I...>) {
    Vec<S> low = __builtin_shufflevector(a, b, interleaved<S, Width, (int)I>(false)...);
    Vec<S> high = __builtin_shufflevector(a, b, interleaved<S, Width, (int)I>(true)...);
    a = low, b = high;
}
template <class S, int Width>
static inline void stage(Vec<S>* r) {
    constexpr int L = Simd<S>::lanes;
    if constexpr (Width < L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (!(i & Width)) exchange<S, Width>(r[i], r[i + Width], std::make_index_sequence<L>());
        stage<S, 2 * Width>(r);
    }
}
// (rows, cols) of leading dimension from_ld -> (cols, rows)
template <class S>
static void transpose(const S* from, Index from_ld, S* to, Index to_ld, Index rows, Index cols) {
    constexpr int L = Simd<S>::lanes;
    for (Index i = 0; i < rows; i += L)
        for (Index j = 0; j < cols; j += L) {
            if (i + L <= rows && j + L <= cols) {
                Vec<S> r[L];
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) r[l] = load(from + (i + l) * from_ld + j);
                stage<S, 1>(r);
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) store(to + (j + l) * to_ld + i, r[l]);
            } else
                for (Index a = i; a < std::min(rows, i + L); a++)
                    for (Index b = j; b < std::min(cols, j + L); b++) to[b * to_ld + a] = from[a * from_ld + b];
        }
}

// ---------------------------------------------------------------- micro-kernels

constexpr Index RUN = 256;  // a sum is made of runs of so many terms: in one long sum the rounding errors would grow

// to[m] (+)= sum_k w(k, m) from[k] for M rows of V vectors of tokens; w(k, m) is w[k * M + m] if packed, else
// w[k * wk + m * wm]
template <class S, int M, int V, bool Packed>
static inline void multiply_micro(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index inner,
                                  S* to, const Index* to_rows, Index tile, bool add) {
    constexpr int L = Simd<S>::lanes;
    for (Index start = 0; start < inner; start += RUN) {
        Vec<S> sum[M][V];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] = Vec<S>{};
        for (Index k = start; k < std::min(inner, start + RUN); k++, w += Packed ? M : wk) {
            const S* row = from + from_rows[k] * tile;
            Vec<S> x[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) x[v] = load(row + v * L);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[m][v] += w[Packed ? m : m * wm] * x[v];
        }
        bool more = add || start;
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                S* at = to + to_rows[m] * tile + v * L;
                store(at, more ? load(at) + sum[m][v] : sum[m][v]);
            }
    }
}

template <class S, int M, int V, bool Packed>
static void multiply_rows(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index inner, S* to,
                          const Index* to_rows, Index rows, Index tile, bool add) {
    Index m = 0;
    const Index next = Packed ? inner : wm;  // from the weights of one row to those of the next
    for (; m + M <= rows; m += M)
        for (Index t = 0; t < tile; t += V * Simd<S>::lanes)
            multiply_micro<S, M, V, Packed>(w + m * next, wk, wm, from + t, from_rows, inner, to + t, to_rows + m, tile,
                                            add);
    if constexpr (M > 1)
        if (m < rows)
            multiply_rows<S, (M > 4 ? M - 4 : M - 1), V, Packed>(w + m * next, wk, wm, from, from_rows, inner, to,
                                                                 to_rows + m, rows - m, tile, add);
}

template <class S>
static void multiply(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index inner, S* to,
                     const Index* to_rows, Index rows, Index tile, bool add) {
    if (wk)
        multiply_rows<S, 8, 1, false>(w, wk, wm, from, from_rows, inner, to, to_rows, rows, tile, add);
    else if (tile % (2 * Simd<S>::lanes))
        multiply_rows<S, MICRO_ROWS, 1, true>(w, 0, 0, from, from_rows, inner, to, to_rows, rows, tile, add);
    else
        multiply_rows<S, MICRO_ROWS, 2, true>(w, 0, 0, from, from_rows, inner, to, to_rows, rows, tile, add);
}

// gradient[m][V vectors] (+)= sum over columns and tokens of from[m][token] panel[token][V vectors]. The sum of a tile
// is added at once: in one long sum over all tokens the rounding errors would grow.
template <class S, int M, int V>
static inline void accumulate_micro(const S* from, const Index* from_rows, const Index* columns, Index count,
                                    Index tile, const S* const* panels, Index panel_ld, Index at, Index tokens,
                                    S* gradient, Index gradient_ld, bool add) {
    constexpr int L = Simd<S>::lanes;
    Vec<S> sum[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[m][v] = Vec<S>{};
    for (Index c = 0; c < count; c++) {
        const S* rows[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) rows[m] = from + (columns[c] + from_rows[m]) * tile;
        const S* panel = panels[c] + at;
        for (Index t = 0; t < tokens; t++, panel += panel_ld) {
            Vec<S> p[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) p[v] = load(panel + v * L);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[m][v] += rows[m][t] * p[v];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            S* to = gradient + m * gradient_ld + v * L;
            store(to, add ? load(to) + sum[m][v] : sum[m][v]);
        }
}

template <class S, int M>
static void accumulate_rows(const S* from, const Index* from_rows, Index rows, const Index* columns, Index count,
                            Index tile, const S* const* panels, Index panel_ld, Index width, Index tokens, S* gradient,
                            bool add) {
    constexpr int L = Simd<S>::lanes;
    Index m = 0;
    for (; m + M <= rows; m += M) {
        Index j = 0;
        for (; j + 2 * L <= width; j += 2 * L)
            accumulate_micro<S, M, 2>(from, from_rows + m, columns, count, tile, panels, panel_ld, j, tokens,
                                      gradient + m * width + j, width, add);
        for (; j < width; j += L)
            accumulate_micro<S, M, 1>(from, from_rows + m, columns, count, tile, panels, panel_ld, j, tokens,
                                      gradient + m * width + j, width, add);
    }
    if constexpr (M > 1)
        if (m < rows)
            accumulate_rows<S, (M > 4 ? M - 4 : M - 1)>(from, from_rows + m, rows - m, columns, count, tile, panels,
                                                        panel_ld, width, tokens, gradient + m * width, add);
}

// ---------------------------------------------------------------- the walk over tiles

struct Team {  // the threads that share a tile
    int rank, size;
    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
    Index first(Index count) const { return count * rank / size; }
    Index last(Index count) const { return count * (rank + 1) / size; }
};

static Team everyone() {
#ifdef _OPENMP
    return {omp_get_thread_num(), omp_get_num_threads()};
#else
    return {0, 1};
#endif
}

template <class S>
struct Weights {  // a factor as its step multiplies with it
    const S* data;
    const Index* batch;  // offsets, or null where it is `size` times the batch
    Index size, wk, wm;  // strides of inner and row; zero if packed
    const S* at(Index b) const { return data + (batch ? batch[b] : b * size); }
};

// How many of the rows left the next micro-kernel takes.
static constexpr Index micro_rows(Index left) {
    Index m = MICRO_ROWS;
    while (m > left) m = m > 4 ? m - 4 : m - 1;
    return m;
}

// (rows, inner) -> for every group of rows that a micro-kernel takes, contiguous (inner, rows of the group)
template <class S>
static void pack_matrix(const S* from, const Index* row_at, const Index* inner_at, Index rows, Index inner, S* to) {
    constexpr Index L = Simd<S>::lanes;
    bool plain = true;
    for (Index k = 0; k < inner; k++) plain &= inner_at[k] == k;
    for (Index m = 0; m < rows;) {
        Index group = micro_rows(rows - m), k = 0;
        // A whole vector is stored; what is too much of it is overwritten by the next one.
        for (; plain && group <= L && (k + L - 1) * group + L <= inner * group; k += L) {
            Vec<S> r[L];
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) r[l] = l < group ? load(from + row_at[m + l] + k) : Vec<S>{};
            stage<S, 1>(r);
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) store(to + (k + l) * group, r[l]);
        }
        for (; k < inner; k++)
            for (Index i = 0; i < group; i++) to[k * group + i] = from[row_at[m + i] + inner_at[k]];
        to += group * inner, m += group;
    }
}

template <class S>
static void pack(const Step& s, const S* factor, S* to, bool backward, Team team) {
    for (Index b = team.first(s.batches); b < team.last(s.batches); b++) {
        const S* from = factor + s.w_b[b];
        if (backward)
            pack_matrix(from, s.w_k, s.w_r, s.inner, s.rows, to + b * s.rows * s.inner);
        else
            pack_matrix(from, s.w_r, s.w_k, s.rows, s.inner, to + b * s.rows * s.inner);
    }
}

// Token-major memory behind a tile: `tokens` rows of `features`.
template <class S, class Pointer>
struct Tokens {
    Pointer data;
    Index features, tokens;
};
template <class S>
using Source = Tokens<S, const S*>;
template <class S>
using Sink = Tokens<S, S*>;

// features [first, first + count) of token-major memory -> rows of a tile; absent tokens and features are zero
template <class S>
static void read_rows(Source<S> from, Index first, Index count, S* to, Index tile) {
    Index present = std::max<Index>(0, std::min(count, from.features - first));
    if (from.tokens < tile) std::fill_n(to, present * tile, S(0));  // arithmetic on leftovers may be slow
    transpose(from.data + first, from.features, to, tile, from.tokens, present);
    std::fill_n(to + present * tile, (count - present) * tile, S(0));
}
template <class S>
static void write_rows(const S* from, Index tile, Sink<S> to, Index first, Index count, const S* bias) {
    count = std::min(count, to.features - first);
    if (count <= 0) return;
    transpose(from, tile, to.data + first, to.features, count, to.tokens);
    if (bias)
        for (Index t = 0; t < to.tokens; t++)
            for (Index j = first; j < first + count; j++) to.data[t * to.features + j] += bias[j];
}
template <class S>
static void read_tile(Source<S> from, S* to, Index width, Index tile, Team team) {
    constexpr Index block = 4 * Simd<S>::lanes;
    for (Index i = team.rank * block; i < width; i += team.size * block)
        read_rows(from, i, std::min(block, width - i), to + i * tile, tile);
    team.barrier();
}
template <class S>
static void write_tile(const S* from, Index tile, Sink<S> to, const S* bias, Team team) {
    constexpr Index block = 4 * Simd<S>::lanes;
    for (Index i = team.rank * block; i < to.features; i += team.size * block)
        write_rows(from + i * tile, tile, to, i, std::min(block, to.features - i), bias);
    team.barrier();
}

// One direction of a step: where its products read and write.
struct Side {
    const Index *batch, *column, *row;
    Index rows, stride;
    bool run() const { return stride == 1; }  // whether a product's rows are neighbours
};
static Side before(const Step& s) {
    return {s.in_b, s.in_c, s.in_k, s.inner, s.in_stride};
}
static Side after(const Step& s) {
    return {s.out_b, s.out_c, s.out_r, s.rows, s.out_stride};
}

// All products of a step. Where rows are neighbours the first step can read token-major memory and the last one write
// it, a product at a time, through `scratch`: then these states need no room in cache.
template <class S>
static void run_step(const Step& s, const Weights<S>& w, Side in, Side out, const S* from, S* to,
                     const Source<S>* source, const Sink<S>* sink, const S* bias, S* scratch, Index tile, bool add,
                     Team team) {
    for (Index p = team.first(s.pairs()); p < team.last(s.pairs()); p++) {
        Index b = p / s.columns, c = p % s.columns;
        Index in_at = in.batch[b] + in.column[c], out_at = out.batch[b] + out.column[c];
        const S* rows_in = from + in_at * tile;
        S* rows_out = to + out_at * tile;
        if (source) {
            read_rows(*source, in_at, in.rows, scratch, tile);
            rows_in = scratch;
        }
        if (sink) rows_out = scratch + in.rows * tile;
        multiply(w.at(b), w.wk, w.wm, rows_in, in.row, in.rows, rows_out, out.row, out.rows, tile, add);
        if (sink) write_rows(rows_out, tile, *sink, out_at, out.rows, bias);
    }
    team.barrier();
}

// ---------------------------------------------------------------- few tokens
//
// With fewer tokens than a vector has lanes a tile would be mostly empty. Then a state is one plain vector per token,
// and each matrix of a factor meets `count` = tokens x columns pieces of it. If these are few as well, they are
// multiplied with the rows of the matrix as they lie in memory; otherwise they make up a tile.

// The sum of all lanes of r[i], for every i, in lane i.
template <class S, int Width>
static inline void sum_lanes(Vec<S>* r) {
    constexpr int L = Simd<S>::lanes;
    if constexpr (Width < L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i += 2 * Width) {
            exchange<S, Width>(r[i], r[i + Width], std::make_index_sequence<L>());
            r[i] += r[i + Width];
        }
        sum_lanes<S, 2 * Width>(r);
    }
}

// to[m] = sum_k w[m][k] from[k] for as many rows as a vector has lanes
template <class S>
static inline void dot_rows(const S* const* w, const S* from, Index inner, S* to) {
    constexpr int L = Simd<S>::lanes;
    Vec<S> sum[L];
#pragma GCC unroll 16
    for (int m = 0; m < L; m++) sum[m] = Vec<S>{};
    Index k = 0;
    for (; k + L <= inner; k += L) {
        Vec<S> x = load(from + k);
#pragma GCC unroll 16
        for (int m = 0; m < L; m++) sum[m] += load(w[m] + k) * x;
    }
    sum_lanes<S, 1>(sum);
    for (; k < inner; k++)
        for (int m = 0; m < L; m++) sum[0][m] += w[m][k] * from[k];
    store(to, sum[0]);
}

template <class S>
struct States {  // of a few tokens: one row of features each
    S* data;
    Index width;
};

// One step for a few tokens. `room` has space for a tile of its inner and row features.
template <class S>
static void run_few(const Step& s, const S* factor, States<const S> from, States<S> to, Index tokens, S* room, bool add,
                    Team team) {
    constexpr Index L = Simd<S>::lanes, block = L;
    Index count = tokens * s.columns, tile = (count + L - 1) / L * L, blocks = (s.rows + block - 1) / block;
    bool dots = count < L && s.w_inner == 1;
    S *inputs = room, *outputs = room + s.inner * tile;
    std::vector<Index> each(std::max(s.inner, block));  // rows of a tile, one after the other
    for (size_t i = 0; i < each.size(); i++) each[i] = i;
    Index gathered = -1;
    for (Index unit = team.first(s.batches * blocks); unit < team.last(s.batches * blocks); unit++) {
        Index b = unit / blocks, first = unit % blocks * block, rows = std::min(block, s.rows - first);
        for (Index i = 0; b != gathered && i < count; i++) {
            const S* at = from.data + i / s.columns * from.width + s.in_b[b] + s.in_c[i % s.columns];
            Index item = dots ? i * s.inner : i, next = dots ? 1 : tile;
            for (Index k = 0; k < s.inner; k++) inputs[item + k * next] = at[s.in_k[k]];
        }
        if (b != gathered && !dots)
            for (Index k = 0; k < s.inner; k++) std::fill(inputs + k * tile + count, inputs + (k + 1) * tile, S(0));
        gathered = b;
        const S* w = factor + s.w_b[b];
        if (dots) {
            const S* at[L];
            for (Index m = 0; m < L; m++) at[m] = w + s.w_r[std::min(first + m, s.rows - 1)];
            for (Index i = 0; i < count; i++) dot_rows(at, inputs + i * s.inner, s.inner, outputs + i * L);
        } else
            multiply(w + first * s.w_row, s.w_inner, s.w_row, inputs, each.data(), s.inner, outputs, each.data(), rows,
                     tile, false);
        for (Index i = 0; i < count; i++) {
            S* at = to.data + i / s.columns * to.width + s.out_b[b] + s.out_c[i % s.columns];
            for (Index m = 0; m < rows; m++) {
                S value = outputs[dots ? i * L + m : m * tile + i], &y = at[s.out_r[first + m]];
                y = add ? y + value : value;
            }
        }
    }
    team.barrier();
}

static bool few(const Program& p, Index n, Index lanes) {
    for (auto& term : p.terms)
        for (auto& s : term)
            if (!s.w_row || !s.w_inner) return false;
    return n < lanes;
}

template <class S>
static void forward_few(const Program& p, const S* const* factors, const S* x, const S* bias, S* y, Index n,
                        int threads) {
    constexpr Index L = Simd<S>::lanes;
    Index room = 0;
    for (auto& term : p.terms)
        for (auto& s : term) room = std::max(room, (s.inner + L) * (n * s.columns + L));
    Buffer<S> padded(n * p.width_in), result(n * p.width_out), middle(2 * n * p.widest);
    bool direct = p.width_out == p.out_features;
    States<S> last{direct ? y : result.data, p.width_out};
#pragma omp parallel num_threads(threads)
    {
        Team team = everyone();
        Buffer<S> own(room);
        if (p.width_in > p.in_features) {
            for (Index t = team.first(n); t < team.last(n); t++) {
                S* row = std::copy_n(x + t * p.in_features, p.in_features, padded.data + t * p.width_in);
                std::fill_n(row, p.width_in - p.in_features, S(0));
            }
            team.barrier();
        }
        for (auto& term : p.terms) {
            States<const S> from{p.width_in > p.in_features ? padded.data : x, p.width_in};
            for (size_t k = 0; k < term.size(); k++) {
                const Step& s = term[k];
                bool ends = k + 1 == term.size();
                States<S> to = ends ? last : States<S>{middle.data + k % 2 * n * p.widest, s.width_out};
                run_few(s, factors[s.factor], from, to, n, own.data, ends && &term != &p.terms[0], team);
                from = {to.data, to.width};
            }
        }
        for (Index t = 0; t < n; t++)
            for (Index j = team.first(p.out_features); j < team.last(p.out_features) && (bias || !direct); j++)
                y[t * p.out_features + j] = last.data[t * p.width_out + j] + (bias ? bias[j] : S(0));
    }
}

// ---------------------------------------------------------------- forward and backward

// Two vectors, so that the micro-kernels have enough to do; more where factors are read from memory for every tile.
template <class S>
static Index tile_of(const Program& p, Index tokens) {
    constexpr Index L = Simd<S>::lanes;
    return tokens <= L ? L : p.heavy() && tokens >= 8 * L ? 8 * L : 2 * L;
}
template <class S>
static Index round_up(Index count) {
    constexpr Index L = Simd<S>::lanes;
    return (count + L - 1) / L * L;
}

// How a call is divided: its tiles among the threads or, where there are fewer tiles than threads, every tile's
// products.
template <class S>
struct Division {
    Index tile, tiles;
    bool shared, small;  // small: so few tokens that packing the factors would not pay

    Division(const Program& p, Index n, int threads) : tile(tile_of<S>(p, n)), tiles((n + tile - 1) / tile) {
        shared = tiles < threads, small = tiles < 4;
    }
    Team team(Team all) const { return shared ? all : Team{0, 1}; }
    Index first(Team all) const { return shared ? 0 : all.first(tiles); }
    Index last(Team all) const { return shared ? tiles : all.last(tiles); }
};

// A factor for its step, or for the step back; packed into `room`, of which what is left is returned in it.
template <class S>
static Weights<S> weights(const Step& s, const S* factor, S*& room, bool backward, bool small, Team team) {
    if (small && s.w_row && s.w_inner)
        return backward ? Weights<S>{factor, s.w_b, 0, s.w_row, s.w_inner}
                        : Weights<S>{factor, s.w_b, 0, s.w_inner, s.w_row};
    S* to = room;
    room += s.batches * s.rows * s.inner;
    pack(s, factor, to, backward, team);
    return {to, nullptr, s.rows * s.inner, 0, 0};
}

// All factors as their steps multiply with them, in order.
template <class S>
static std::vector<Weights<S>> all_weights(const Program& p, const S* const* factors, S* packed, bool backward,
                                           bool small, Team all) {
    std::vector<Weights<S>> result;
    for (auto& term : p.terms)
        for (auto& s : term) result.push_back(weights(s, factors[s.factor], packed, backward, small, all));
    return result;
}

// The states after every step but each term's last, into `middle`, one after the other; the last ones into `sink`, or
// added up in `to`; neither where only the intermediate states are wanted.
template <class S>
static void run_forward(const Program& p, const std::vector<Weights<S>>& w, const S* from, S* middle, S* to,
                        const Source<S>* source, const Sink<S>* sink, const S* bias, S* scratch, Index tile,
                        Team team) {
    size_t at = 0;
    for (auto& term : p.terms) {
        const S* state = from;
        for (auto& s : term) {
            bool begins = &s == &term.front(), ends = &s == &term.back();
            const Weights<S>& matrices = w[at++];
            if (ends && !to && !sink) break;
            run_step(s, matrices, before(s), after(s), state, ends ? to : middle, begins ? source : nullptr,
                     ends ? sink : nullptr, bias, scratch, tile, ends && &term != &p.terms[0], team);
            state = middle;
            if (!ends) middle += s.width_out * tile;
        }
    }
}

template <class S>
static void forward(const Program& p, const S* const* factors, const S* x, const S* bias, S* y, S* saved, Index n,
                    int threads) {
    if (!saved && few(p, n, Simd<S>::lanes)) return forward_few(p, factors, x, bias, y, n, threads);
    Division<S> division(p, n, threads);
    Index tile = division.tile, states = p.states();
    expect(y, n * p.out_features * sizeof(S));
    if (saved) expect(saved, division.tiles * tile * states * sizeof(S));
    bool single = p.terms.size() == 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    Index room = (rows_in + rows_out + (saved ? 0 : states)) * tile;
    Buffer<S> packed(p.factor_entries()), common(division.shared ? room : 0);
#pragma omp parallel num_threads(threads)
    {
        Team all = everyone(), team = division.team(all);
        auto w = all_weights(p, factors, packed.data, false, division.small, all);
        Buffer<S> own(division.shared ? 0 : room), scratch(2 * p.widest * tile);
        S* xs = division.shared ? common.data : own.data;
        S *ys = xs + rows_in * tile, *states_memory = ys + rows_out * tile;
        all.barrier();  // the factors are packed by all
        for (Index i = division.first(all); i < division.last(all); i++) {
            Index tokens = std::min(tile, n - i * tile);
            Source<S> source{x + i * tile * p.in_features, p.in_features, tokens};
            Sink<S> sink{y + i * tile * p.out_features, p.out_features, tokens};
            if (!stream_in) read_tile(source, xs, p.width_in, tile, team);
            run_forward(p, w, xs, saved ? saved + i * states * tile : states_memory, ys, stream_in ? &source : nullptr,
                        stream_out ? &sink : nullptr, bias, scratch.data, tile, team);
            if (!stream_out) write_tile(ys, tile, sink, bias, team);
        }
    }
}

// The gradient of a factor is a sum over tokens of products of the state before its step and the gradient of the state
// after it. One of them is read feature-major, a token at a time; the other token-major, in vectors of features:
// `major`. At the ends of a term that is the input or the gradient of the output as they lie in memory.
struct FactorGradient {
    bool by_inner;  // whether the vectors are of the inner features, else of the rows
    Side vectors, other;
    Index width, padded;  // of the vectors, and rounded up to whole ones

    template <class S>
    static FactorGradient of(const Step& s, bool begins, bool ends, S) {
        bool by_inner = begins || !ends;
        FactorGradient g{by_inner, by_inner ? before(s) : after(s), by_inner ? after(s) : before(s), 0, 0};
        g.width = g.vectors.rows, g.padded = round_up<S>(g.width);
        return g;
    }
    Index entries() const { return other.rows * padded; }  // of one batch entry
};

// This tile's share into, or added to, `sum`, laid out (batch, other rows, padded vectors).
template <class S>
static void add_factor_gradient(const Step& s, const FactorGradient& g, const Source<S>* major, const S* vectors_state,
                                const S* other_state, Index tokens, Index tile, S* panel_memory, S* sum, bool add,
                                Team team) {
    std::vector<const S*> panels(s.columns);
    bool whole = major && g.vectors.run() && g.width == g.padded;
    for (Index b = team.first(s.batches); b < team.last(s.batches); b++) {
        bool direct = whole;
        for (Index c = 0; direct && c < s.columns; c++) {
            Index at = g.vectors.batch[b] + g.vectors.column[c];
            direct = at + g.width <= major->features;
            panels[c] = major->data + at;
        }
        for (Index c = 0; !direct && c < s.columns; c++) {
            Index at = g.vectors.batch[b] + g.vectors.column[c];
            S* panel = panel_memory + c * tile * g.padded;
            panels[c] = panel;
            for (Index t = 0; t < tokens; t++)
                for (Index k = 0; k < g.padded; k++) {
                    Index feature = k < g.width ? at + g.vectors.row[k] : -1;
                    S value = 0;
                    if (feature >= 0 && !major)
                        value = vectors_state[feature * tile + t];
                    else if (feature >= 0 && feature < major->features)
                        value = major->data[t * major->features + feature];
                    panel[t * g.padded + k] = value;
                }
        }
        accumulate_rows<S, MICRO_ROWS>(other_state + g.other.batch[b] * tile, g.other.row, g.other.rows, g.other.column,
                                       s.columns, tile, panels.data(), direct ? major->features : g.padded, g.padded,
                                       tokens, sum + b * g.entries(), add);
    }
}

// The sums of the threads -> the factor's own layout.
template <class S>
static void write_factor_gradient(const Step& s, const FactorGradient& g, const std::vector<Buffer<S>>& sums,
                                  size_t count, Index offset, S* to, Team all) {
    bool transposed = !g.by_inner && s.w_row && s.w_inner == 1;
    for (Index b = all.first(s.batches); b < all.last(s.batches); b++) {
        S* total = sums[0].data + offset + b * g.entries();
        for (size_t c = 1; c < count; c++) {
            const S* more = sums[c].data + offset + b * g.entries();
            for (Index e = 0; e < g.entries(); e++) total[e] += more[e];
        }
        S* into = to + s.w_b[b];
        if (transposed)
            transpose(total, g.padded, into, s.w_row, s.inner, s.rows);
        else
            for (Index r = 0; r < s.rows; r++)
                for (Index k = 0; k < s.inner; k++)
                    into[s.w_r[r] + s.w_k[k]] = total[g.by_inner ? r * g.padded + k : k * g.padded + r];
    }
}

template <class S>
static void backward(const Program& p, const S* const* factors, const S* x, const S* dy, const S* saved, S* dx,
                     S* const* dfactors, Index n, int threads) {
    Division<S> division(p, n, threads);
    Index tile = division.tile, states = p.states();
    if (dx) expect(dx, n * p.in_features * sizeof(S));
    std::vector<std::vector<FactorGradient>> gradients;
    Index panel = 0, entries = 0;
    for (auto& term : p.terms) {
        gradients.emplace_back();
        for (auto& s : term) {
            auto g = FactorGradient::of(s, &s == &term.front(), &s == &term.back(), S());
            gradients.back().push_back(g);
            panel = std::max(panel, s.columns * g.padded * tile);
            entries += s.batches * g.entries();
        }
    }
    bool recompute = !saved && states, single = p.terms.size() == 1 && p.terms[0].size() > 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    Index room = (rows_out + rows_in + (recompute ? states : 0) + 2 * p.widest) * tile;
    Buffer<S> packed(p.factor_entries()), packed_forward(recompute ? p.factor_entries() : 0);
    Buffer<S> common(division.shared ? room : 0);
    std::vector<Buffer<S>> sums;
    for (int i = 0; i < (division.shared ? 1 : threads); i++) sums.emplace_back(entries);
#pragma omp parallel num_threads(threads)
    {
        Team all = everyone(), team = division.team(all);
        auto w_back = all_weights(p, factors, packed.data, true, division.small, all);
        std::vector<Weights<S>> w;
        if (recompute) w = all_weights(p, factors, packed_forward.data, false, division.small, all);
        Buffer<S> own(division.shared ? 0 : room), panels(panel), scratch(2 * p.widest * tile);
        S* sum = sums[division.shared ? 0 : all.rank].data;
        S* dys = division.shared ? common.data : own.data;
        S *dxs = dys + rows_out * tile, *turns[2] = {dxs + rows_in * tile, dxs + (rows_in + p.widest) * tile};
        S* recomputed = turns[1] + p.widest * tile;
        all.barrier();
        for (Index i = division.first(all); i < division.last(all); i++) {
            Index tokens = std::min(tile, n - i * tile);
            Source<S> input{x + i * tile * p.in_features, p.in_features, tokens};
            Source<S> output{dy + i * tile * p.out_features, p.out_features, tokens};
            Sink<S> sink{dx ? dx + i * tile * p.in_features : nullptr, p.in_features, tokens};
            if (recompute) {  // the input's state lies where its gradient will be
                if (!stream_in) read_tile(input, dxs, p.width_in, tile, team);
                run_forward(p, w, dxs, recomputed, (S*)nullptr, stream_in ? &input : nullptr, (const Sink<S>*)nullptr,
                            (const S*)nullptr, scratch.data, tile, team);
            }
            if (!stream_out) read_tile(output, dys, p.width_out, tile, team);
            const S* middle = saved ? saved + i * states * tile : recomputed;
            Index offset = entries, back = w_back.size();
            for (auto& term : p.terms) middle += term_states(term) * tile;
            for (size_t j = p.terms.size(); j-- > 0;) {  // terms and steps from the last to the first
                auto& term = p.terms[j];
                const S* g = dys;
                for (size_t k = term.size(); k-- > 0;) {
                    const Step& s = term[k];
                    const FactorGradient& gradient = gradients[j][k];
                    bool begins = k == 0, ends = k + 1 == term.size();
                    if (!begins) middle -= s.width_in * tile;
                    offset -= s.batches * gradient.entries(), back--;
                    const Source<S>* major = begins ? &input : (ends ? &output : nullptr);
                    if (dfactors[s.factor])
                        add_factor_gradient(s, gradient, major, middle, gradient.by_inner ? g : middle, tokens, tile,
                                            panels.data, sum + offset, i > division.first(all), team);
                    if (begins && !dx) continue;
                    S* to = begins ? dxs : turns[k % 2];
                    run_step(s, w_back[back], after(s), before(s), g, to, ends && stream_out ? &output : nullptr,
                             begins && stream_in ? &sink : nullptr, (const S*)nullptr, scratch.data, tile,
                             begins && j + 1 < p.terms.size(), team);
                    g = to;
                }
            }
            team.barrier();
            if (dx && !stream_in) write_tile(dxs, tile, sink, (const S*)nullptr, team);
        }
        all.barrier();
        Index offset = 0;
        size_t count = division.shared ? 1 : all.size;  // fewer threads may run than were asked for
        for (size_t j = 0; j < p.terms.size(); j++)
            for (size_t k = 0; k < p.terms[j].size(); k++) {
                const Step& s = p.terms[j][k];
                if (S* to = dfactors[s.factor]) write_factor_gradient(s, gradients[j][k], sums, count, offset, to, all);
                offset += s.batches * gradients[j][k].entries();
            }
    }
}

}  // namespace

#define EXPORT(S, NAME)                                                                                            \
    extern "C" void NAME##_forward(const Index* program, const S* const* factors, const S* x, const S* bias, S* y, \
                                   S* saved, Index n, int threads) {                                               \
        forward<S>(Program(program), factors, x, bias, y, saved, n, threads);                                      \
    }                                                                                                              \
    extern "C" void NAME##_backward(const Index* program, const S* const* factors, const S* x, const S* dy,        \
                                    const S* saved, S* dx, S* const* dfactors, Index n, int threads) {             \
        backward<S>(Program(program), factors, x, dy, saved, dx, dfactors, n, threads);                            \
    }                                                                                                              \
    extern "C" Index NAME##_tile(const Index* program, Index tokens) {                                             \
        return tile_of<S>(Program(program), tokens);                                                               \
    }
EXPORT(float, float32)
EXPORT(double, float64)
