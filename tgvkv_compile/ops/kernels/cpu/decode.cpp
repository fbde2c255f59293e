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

// `BLOCKS` vectors of the sum of `count` rows, each times its share.
template <int64_t BLOCKS, typename T>
inline void sum_rows(const float* shares, const T* rows, int64_t count, int64_t dim, T* output) {
    Vector sums[BLOCKS] = {};
    for (int64_t slot = 0; slot < count; ++slot) {
        for (int64_t block = 0; block < BLOCKS; ++block) {
            sums[block] += shares[slot] * read_lanes(rows + slot * dim + block * LANES);
        }
    }
    for (int64_t block = 0; block < BLOCKS; ++block) {
        for (int64_t lane = 0; lane < LANES; ++lane) write(sums[block][lane], output + block * LANES + lane);
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
    const T* keys = arena_keys + step.segment_start[at] * dim;
    const T* values = arena_values + step.segment_start[at] * dim;
    std::vector<float> query(group * dim);
    for (int64_t one = 0; one < group; ++one) {
        const T* from = static_cast<const T*>(step.query) + sample * step.query_sample + (kv_head * group + one) * step.query_head;
        read_scaled(from, dim, step.scale, &query[one * dim]);
    }
    float* shares = probabilities + (sample * step.heads + kv_head * group) * width;
    T* output = static_cast<T*>(step.output) + (sample * step.heads + kv_head * group) * dim;
    int64_t slot = 0;
    for (; slot + 4 <= used; slot += 4) {
        for (int64_t one = 0; one < group; ++one) dots<4>(&query[one * dim], keys + slot * dim, dim, shares + one * width + slot);
    }
    for (; slot < used; ++slot) {
        for (int64_t one = 0; one < group; ++one) dots<1>(&query[one * dim], keys + slot * dim, dim, shares + one * width + slot);
    }
    for (int64_t one = 0; one < group; ++one) softmax(shares + one * width, used);
    for (int64_t one = 0; one < group; ++one) {
        const float* of_one = shares + one * width;
        int64_t part = 0;
        for (; part + 4 * LANES <= dim; part += 4 * LANES) sum_rows<4>(of_one, values + part, used, dim, output + one * dim + part);
        for (; part + LANES <= dim; part += LANES) sum_rows<1>(of_one, values + part, used, dim, output + one * dim + part);
        for (; part < dim; ++part) {
            float total = 0.0f;
            for (int64_t at = 0; at < used; ++at) total += of_one[at] * read(values + at * dim + part);
            write(total, output + one * dim + part);
        }
    }
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

template <typename T>
void run(const Step& step) {
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
        attend<T>(step, task / step.kv_heads, task % step.kv_heads, probabilities, width);
    }
    for (int64_t sample = 0; sample < step.batch; ++sample) evict(step, sample, probabilities, width);
}

}  // namespace

extern "C" void step_float32(const Step* step) { run<float>(*step); }

extern "C" void step_bfloat16(const Step* step) { run<Bfloat16>(*step); }
