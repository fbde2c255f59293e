// Weighted sums of attention rows where their log-sum-exp is known: `ops/weighing.py` says what the tensors are. A thread has
// the heads of one key/value head of one sample; what heads sum is added up at the end, in their order.

extern "C" struct Weighing {
    // Sizes. The innermost dimension of `query` and `key` is contiguous; strides count elements, 0 where a mask is broadcast.
    int64_t batch, heads, kv_heads, dim, rows, columns;
    int64_t query_sample, query_head, query_row, key_sample, key_head, key_row;
    int64_t lse_sample, lse_head, lse_row, mask_sample, mask_row, mask_column;
    int64_t is_causal, threads;
    double scale;
    const void *query, *key;
    const float *lse, *weights;            // [B, H, R] by its strides, [B, R]
    const uint8_t *wanted, *mask;  // [B, S], by its strides or null
    float *sums, *seen;                    // [B, S], zeros
};

namespace {

constexpr int64_t VECTORS = 2, PANEL = VECTORS * LANES;

// What of a sample is looked at: rows that weigh something, columns that are wanted, padded to whole panels.
struct Chosen {
    std::vector<int32_t> rows, columns;
    int64_t count;  // of the columns
};

inline Chosen choose(const Weighing& given, int64_t sample) {
    Chosen chosen;
    const float* weights = given.weights + sample * given.rows;
    for (int64_t row = 0; row < given.rows; ++row) {
        if (weights[row] != 0.0f) chosen.rows.push_back(static_cast<int32_t>(row));
    }
    const uint8_t* flags = given.wanted + sample * given.columns;
    for (int64_t column = 0; column < given.columns; ++column) {
        if (flags[column]) chosen.columns.push_back(static_cast<int32_t>(column));
    }
    chosen.count = static_cast<int64_t>(chosen.columns.size());
    while (chosen.columns.size() % PANEL) chosen.columns.push_back(chosen.columns.back());
    return chosen;
}

// `ROWS` rows of one head on one panel of keys, transposed; `sums` and, if asked for, `seen` grow by them.
template <int64_t ROWS>
inline void add_rows(
    const Weighing& given, int64_t sample, const int32_t* rows, const float* queries, const float* lse, const float* panel,
    const int32_t* columns, Vector* sums, Vector* seen
) {
    Vector logits[ROWS][VECTORS] = {};
    for (int64_t part = 0; part < given.dim; ++part) {
        for (int64_t at = 0; at < VECTORS; ++at) {
            const Vector keys = read_lanes(panel + part * PANEL + at * LANES);
            for (int64_t row = 0; row < ROWS; ++row) logits[row][at] += queries[row * given.dim + part] * keys;
        }
    }
    for (int64_t row = 0; row < ROWS; ++row) {
        const float weight = given.weights[sample * given.rows + rows[row]];
        for (int64_t at = 0; at < VECTORS; ++at) {
            Integers place;
            std::memcpy(&place, columns + at * LANES, sizeof place);
            Integers visible = Integers{} - 1;
            if (given.is_causal) visible = place <= rows[row];
            if (given.mask) {
                const uint8_t* mask = given.mask + sample * given.mask_sample + rows[row] * given.mask_row;
                for (int64_t lane = 0; lane < LANES; ++lane) visible[lane] &= mask[place[lane] * given.mask_column] ? -1 : 0;
            }
            sums[at] += visible ? exp_lanes(logits[row][at] - lse[row]) * weight : Vector{};
            if (seen) seen[at] += visible ? Vector{} + weight : Vector{};
        }
    }
}

template <typename T>
void weigh_heads(const Weighing& given, const Chosen& chosen, int64_t sample, int64_t kv_head, float* sums) {
    const int64_t dim = given.dim, group = given.heads / given.kv_heads, padded = chosen.columns.size();
    const int64_t many = chosen.rows.size();
    const T* key = static_cast<const T*>(given.key) + sample * given.key_sample + kv_head * given.key_head;
    std::vector<float> keys(padded * dim), queries(many * dim), lse(many);
    for (int64_t column = 0; column < padded; ++column) {
        const T* from = key + chosen.columns[column] * given.key_row;
        float* panel = keys.data() + column / PANEL * PANEL * dim + column % PANEL;
        for (int64_t part = 0; part < dim; ++part) panel[part * PANEL] = read(from + part);
    }
    for (int64_t one = 0; one < group; ++one) {
        const int64_t head = kv_head * group + one;
        const T* query = static_cast<const T*>(given.query) + sample * given.query_sample + head * given.query_head;
        for (int64_t row = 0; row < many; ++row) {
            const T* from = query + chosen.rows[row] * given.query_row;
            read_scaled(from, dim, given.scale, &queries[row * dim]);
            lse[row] = given.lse[sample * given.lse_sample + head * given.lse_head + chosen.rows[row] * given.lse_row];
        }
        for (int64_t column = 0; column < padded; column += PANEL) {
            Vector total[VECTORS] = {}, seen[VECTORS] = {};
            Vector* counted = head == 0 ? seen : nullptr;
            const int32_t* columns = chosen.columns.data() + column;
            const float* panel = keys.data() + column * dim;
            int64_t row = 0;
            // Columns are in order: rows before the panel's first see none of it.
            if (given.is_causal) row = std::lower_bound(chosen.rows.begin(), chosen.rows.end(), columns[0]) - chosen.rows.begin();
            for (; row + 4 <= many; row += 4) {
                const float* asked = queries.data() + row * dim;
                add_rows<4>(given, sample, &chosen.rows[row], asked, &lse[row], panel, columns, total, counted);
            }
            for (; row < many; ++row) {
                const float* asked = queries.data() + row * dim;
                add_rows<1>(given, sample, &chosen.rows[row], asked, &lse[row], panel, columns, total, counted);
            }
            std::memcpy(sums + head * padded + column, total, sizeof total);
            for (int64_t at = 0; counted && at < PANEL && column + at < chosen.count; ++at) {
                given.seen[sample * given.columns + columns[at]] = seen[at / LANES][at % LANES];
            }
        }
    }
}

template <typename T>
void weigh(const Weighing& given) {
    for (int64_t sample = 0; sample < given.batch; ++sample) {
        const Chosen chosen = choose(given, sample);
        if (!chosen.count) continue;
        const int64_t padded = chosen.columns.size();
        std::vector<float> sums(given.heads * padded);
        const int threads = static_cast<int>(std::min(given.threads, given.kv_heads));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t kv_head = 0; kv_head < given.kv_heads; ++kv_head) weigh_heads<T>(given, chosen, sample, kv_head, sums.data());
        for (int64_t column = 0; column < chosen.count; ++column) {
            float total = 0.0f;
            for (int64_t head = 0; head < given.heads; ++head) total += sums[head * padded + column];
            given.sums[sample * given.columns + chosen.columns[column]] = total / static_cast<float>(given.heads);
        }
    }
}

}  // namespace

extern "C" void weigh_float32(const Weighing* given) { weigh<float>(*given); }

extern "C" void weigh_bfloat16(const Weighing* given) { weigh<Bfloat16>(*given); }
