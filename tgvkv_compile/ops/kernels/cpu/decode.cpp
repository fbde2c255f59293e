// One decode step of one layer on CPUs: append, attend, score and choose. The plain functions in `ops/cache/decode_step.py` say
// what each part computes, `ops/state.py` what the tensors are. Two passes: over samples and key/value heads, each thread on
// slots that no other touches; then over samples.

namespace {

// The logits of one query over `ROWS` rows, one behind the other.
template <int64_t ROWS, typename T>
inline void dots(const float* query, const T* rows, int64_t dim, float* logits) {
    Vector sums[ROWS] = {};
    int64_t part = 0;
    for (; part + LANES <= dim; part += LANES) {
        const Vector asked = read_lanes(query + part);
        for (int64_t row = 0; row < ROWS; ++row) sums[row] += asked * read_lanes(rows + row * dim + part);
    }
    for (int64_t row = 0; row < ROWS; ++row) logits[row] = sum(sums[row]);
    for (; part < dim; ++part) {
        for (int64_t row = 0; row < ROWS; ++row) logits[row] += query[part] * read(rows + row * dim + part);
    }
}

// In place, over a row that has room for whole vectors.
inline void softmax(float* row, int64_t count) {
    float largest = row[0];
    for (int64_t slot = 1; slot < count; ++slot) largest = std::max(largest, row[slot]);
    const int64_t end = whole_vectors(count);
    std::fill(row + count, row + end, -std::numeric_limits<float>::infinity());
    Vector totals = {};
    for (int64_t slot = 0; slot < end; slot += LANES) {
        const Vector powers = exp_lanes(read_lanes(row + slot) - largest);
        totals += powers;
        std::memcpy(row + slot, &powers, sizeof powers);
    }
    const float total = sum(totals);
    for (int64_t slot = 0; slot < end; slot += LANES) {
        const Vector shares = read_lanes(row + slot) / total;
        std::memcpy(row + slot, &shares, sizeof shares);
    }
}

// `BLOCKS` vectors of the sum of `count` rows, each times its share, are added to the totals.
template <int64_t BLOCKS, typename T>
inline void add_rows(const float* shares, const T* rows, int64_t count, int64_t dim, float* totals) {
    Vector sums[BLOCKS];
    for (int64_t block = 0; block < BLOCKS; ++block) sums[block] = read_lanes(totals + block * LANES);
    for (int64_t slot = 0; slot < count; ++slot) {
        for (int64_t block = 0; block < BLOCKS; ++block) {
            sums[block] += shares[slot] * read_lanes(rows + slot * dim + block * LANES);
        }
    }
    std::memcpy(totals, sums, sizeof sums);
}

// The logits of the queries of a group over `count` rows: `logits` has a row of `width` for each.
template <typename T>
inline void ask(const float* queries, int64_t group, const T* rows, int64_t count, int64_t dim, float* logits, int64_t width) {
    int64_t slot = 0;
    for (; slot + 4 <= count; slot += 4) {
        for (int64_t one = 0; one < group; ++one) dots<4>(queries + one * dim, rows + slot * dim, dim, logits + one * width + slot);
    }
    for (; slot < count; ++slot) {
        for (int64_t one = 0; one < group; ++one) dots<1>(queries + one * dim, rows + slot * dim, dim, logits + one * width + slot);
    }
}

// The other way: what `count` rows add to the outputs `[group, dim]`.
template <typename T>
inline void answer(const float* shares, int64_t group, const T* rows, int64_t count, int64_t dim, float* totals, int64_t width) {
    for (int64_t one = 0; one < group; ++one) {
        const float* of_one = shares + one * width;
        float* total = totals + one * dim;
        int64_t part = 0;
        for (; part + 4 * LANES <= dim; part += 4 * LANES) add_rows<4>(of_one, rows + part, count, dim, total + part);
        for (; part + LANES <= dim; part += LANES) add_rows<1>(of_one, rows + part, count, dim, total + part);
        for (; part < dim; ++part) {
            for (int64_t slot = 0; slot < count; ++slot) total[part] += of_one[slot] * read(rows + slot * dim + part);
        }
    }
}

}  // namespace

extern "C" struct Step {
    // Sizes. Rows of `query`, `key` and `value` and the slots of an arena are contiguous; strides count elements.
    int64_t batch, heads, kv_heads, dim, slots, layers, layer;
    int64_t query_sample, query_head, key_sample, key_head, value_sample, value_head;
    int64_t keys_sample, keys_head, values_sample, values_head;
    // Options: the mode is 0 for "ratio", 1 for "fixed", 2 for "keep".
    int64_t mode, sink_tokens, threads;
    double scale;
    const void *query, *key, *value;
    void *key_arena, *value_arena, *output;
    int32_t* slot_position;
    const int64_t* segment_start;
    int64_t *segment_len, *next_slot, *protect_from;
    const float* keep_rate;
    const int64_t* lengths;
};

namespace {

// The scaled queries `[group, dim]` of a key/value head.
template <typename T>
std::vector<float> read_queries(const Step& step, int64_t sample, int64_t kv_head) {
    const int64_t dim = step.dim, group = step.heads / step.kv_heads;
    std::vector<float> queries(group * dim);
    for (int64_t one = 0; one < group; ++one) {
        const T* from = static_cast<const T*>(step.query) + sample * step.query_sample + (kv_head * group + one) * step.query_head;
        read_scaled(from, dim, step.scale, &queries[one * dim]);
    }
    return queries;
}

template <typename T>
void write_outputs(const Step& step, int64_t sample, int64_t kv_head, const std::vector<float>& totals) {
    const int64_t group = step.heads / step.kv_heads;
    T* output = static_cast<T*>(step.output) + (sample * step.heads + kv_head * group) * step.dim;
    for (size_t at = 0; at < totals.size(); ++at) write(totals[at], output + at);
}

template <typename T>
void attend(const Step& step, int64_t sample, int64_t kv_head, float* probabilities, int64_t width) {
    const int64_t dim = step.dim, group = step.heads / step.kv_heads;
    const int64_t at = sample * step.layers + step.layer;
    const int64_t used = step.segment_len[at] + 1;
    T* arena_keys = static_cast<T*>(step.key_arena) + sample * step.keys_sample + kv_head * step.keys_head;
    T* arena_values = static_cast<T*>(step.value_arena) + sample * step.values_sample + kv_head * step.values_head;
    const T* key = static_cast<const T*>(step.key) + sample * step.key_sample + kv_head * step.key_head;
    const T* value = static_cast<const T*>(step.value) + sample * step.value_sample + kv_head * step.value_head;
    std::copy(key, key + dim, arena_keys + step.next_slot[at] * dim);
    std::copy(value, value + dim, arena_values + step.next_slot[at] * dim);
    const std::vector<float> queries = read_queries<T>(step, sample, kv_head);
    float* shares = probabilities + (sample * step.heads + kv_head * group) * width;
    ask(queries.data(), group, arena_keys + step.segment_start[at] * dim, used, dim, shares, width);
    for (int64_t one = 0; one < group; ++one) softmax(shares + one * width, used);
    std::vector<float> totals(group * dim);
    answer(shares, group, arena_values + step.segment_start[at] * dim, used, dim, totals.data(), width);
    write_outputs<T>(step, sample, kv_head, totals);
}

void evict(const Step& step, int64_t sample, float* probabilities, int64_t width) {
    const int64_t at = sample * step.layers + step.layer;
    const int64_t start = step.segment_start[at], used = step.segment_len[at] + 1, length = step.lengths[sample];
    step.slot_position[sample * step.slots + step.next_slot[at]] = static_cast<int32_t>(length);
    int32_t* positions = step.slot_position + sample * step.slots + start;
    int64_t protect = step.protect_from[at], following = std::numeric_limits<int64_t>::max();
    for (int64_t slot = 0; slot < used; ++slot) {
        if (positions[slot] > protect && positions[slot] < following) following = positions[slot];
    }
    if (following != std::numeric_limits<int64_t>::max()) protect = following;
    int64_t evicted = -1;
    if (step.mode != 2) {
        const float rate = step.keep_rate[at];
        const bool due = step.mode == 1 ? rate != 1.0f : static_cast<float>(used) - static_cast<float>(length + 1) * rate >= 1.0f;
        float* attention = probabilities + sample * step.heads * width;  // the first head's row becomes the sum
        for (int64_t head = 1; due && head < step.heads; ++head) {
            for (int64_t slot = 0; slot < used; slot += LANES) {
                const Vector total = read_lanes(attention + slot) + read_lanes(attention + head * width + slot);
                std::memcpy(attention + slot, &total, sizeof total);
            }
        }
        for (int64_t slot = 0; due && slot < used; ++slot) {
            if (positions[slot] < step.sink_tokens || positions[slot] >= protect) continue;
            const bool less = evicted < 0 || attention[slot] < attention[evicted];
            if (less || (attention[slot] == attention[evicted] && positions[slot] < positions[evicted])) evicted = slot;
        }
    }
    step.protect_from[at] = protect;
    step.segment_len[at] = evicted < 0 ? used : used - 1;
    step.next_slot[at] = start + (evicted < 0 ? used : evicted);
    if (evicted >= 0) positions[evicted] = -1;
}

// `attend` is called for each sample and key/value head, with a row of `width` for each head's attention.
template <typename Attend>
void run(const Step& step, Attend attend) {
    int64_t width = 1, entries = 0;
    for (int64_t sample = 0; sample < step.batch; ++sample) {
        const int64_t used = step.segment_len[sample * step.layers + step.layer] + 1;
        width = std::max(width, whole_vectors(used));
        entries += used;
    }
    static thread_local std::vector<float> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), step.batch * step.heads * width));
    float* probabilities = scratch.data();
    const int64_t tasks = step.batch * step.kv_heads;
    // Waking threads takes longer than a short segment does.
    const bool large = entries * step.heads * step.dim >= 1 << 16;
    const int threads = static_cast<int>(large ? std::min(step.threads, tasks) : 1);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
        attend(step, task / step.kv_heads, task % step.kv_heads, probabilities, width);
    }
    for (int64_t sample = 0; sample < step.batch; ++sample) evict(step, sample, probabilities, width);
}

}  // namespace

extern "C" void step_float32(const Step* step) { run(*step, attend<float>); }

extern "C" void step_bfloat16(const Step* step) { run(*step, attend<Bfloat16>); }
