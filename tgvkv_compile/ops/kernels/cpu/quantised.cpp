// The same step on arenas of quantised rows. A few rows at a time are read into numbers that stay in the processor's nearest
// cache, and are asked and added up there like rows that are not quantised.

namespace {

constexpr int64_t TILE = 16;   // rows at a time
constexpr int64_t AHEAD = 3;   // how many tiles before it is read memory is asked for one
constexpr int64_t LINE = 64;   // bytes that memory gives at a time

// The first slot of the window's entry for the token at `place`.
inline int64_t entry_of(int64_t layer, int64_t entries, int64_t place) { return 2 * (layer * entries + place % entries); }

// Keys or values of one sample and key/value head as the step sees them: its own as they are, the window's in eight bits.
template <typename Kind>
struct Segment {
    uint8_t* arena;         // the first slot's row
    const int32_t* places;  // positions of all slots
    int64_t dim, first, fresh, layer, entries, taken;  // of a window (`ops/cache/window.py`) the new token takes the entry `taken`
    std::vector<float> own;

    static constexpr bool WINDOWED = std::is_same<Kind, Int4>::value;

    uint8_t* row(int64_t slot) const { return arena + slot * row_bytes<Kind>(dim); }

    void append() {
        quantise<Kind>(own.data(), dim, row(fresh));
        if (WINDOWED) quantise<Int8>(own.data(), dim, row(taken));
    }

    void read(int64_t slot, float* values) const {
        if (slot == fresh) {
            std::copy(own.begin(), own.end(), values);
            return;
        }
        if (WINDOWED) {
            const int64_t place = places[slot], at = entry_of(layer, entries, place);
            if (places[at] == place && at != taken) return dequantise<Int8>(row(at), dim, values);
        }
        dequantise<Kind>(row(slot), dim, values);
    }

    // Calls `use(rows, offset, count)` for all of the `used` slots.
    template <typename Use>
    void each_tile(int64_t used, Use use) const {
        std::vector<float> rows(TILE * dim);
        for (int64_t offset = 0; offset < used; offset += TILE) {
            const int64_t count = std::min(TILE, used - offset);
            // Without this half of the time went by waiting for memory, at a third of what it can give.
            const uint8_t* later = row(first + offset + AHEAD * TILE);
            for (int64_t at = 0; at < TILE * row_bytes<Kind>(dim); at += LINE) __builtin_prefetch(later + at);
            for (int64_t one = 0; one < count; ++one) read(first + offset + one, &rows[one * dim]);
            use(rows.data(), offset, count);
        }
    }
};

inline int64_t entries_of(const Step& step, int64_t sample) {
    return step.segment_start[sample * step.layers] / (2 * step.layers);
}

template <typename Kind>
inline int64_t taken_by_new(const Step& step, int64_t sample) {
    return Segment<Kind>::WINDOWED ? entry_of(step.layer, entries_of(step, sample), step.lengths[sample]) : 0;
}

template <typename T>
std::vector<float> read_new(const void* tensor, int64_t offset, int64_t dim) {
    std::vector<float> values(dim);
    read_scaled(static_cast<const T*>(tensor) + offset, dim, 1.0, values.data());
    return values;
}

template <typename T, typename Kind>
void attend_quantised(const Step& step, int64_t sample, int64_t kv_head, float* probabilities, int64_t width) {
    const int64_t dim = step.dim, group = step.heads / step.kv_heads;
    const int64_t at = sample * step.layers + step.layer;
    const int64_t used = step.segment_len[at] + 1;
    const auto segment = [&](void* arena, int64_t offset, std::vector<float> own) {
        return Segment<Kind>{static_cast<uint8_t*>(arena) + offset, step.slot_position + sample * step.slots, dim,
                             step.segment_start[at], step.next_slot[at], step.layer, entries_of(step, sample),
                             taken_by_new<Kind>(step, sample), own};
    };
    auto keys = segment(step.key_arena, sample * step.keys_sample + kv_head * step.keys_head,
                        read_new<T>(step.key, sample * step.key_sample + kv_head * step.key_head, dim));
    auto values = segment(step.value_arena, sample * step.values_sample + kv_head * step.values_head,
                          read_new<T>(step.value, sample * step.value_sample + kv_head * step.value_head, dim));
    std::vector<float> queries = read_queries<T>(step, sample, kv_head);
    for (int64_t one = 0; one < group; ++one) rotate(&queries[one * dim], dim);
    rotate(keys.own.data(), dim);
    keys.append();
    values.append();
    float* shares = probabilities + (sample * step.heads + kv_head * group) * width;
    keys.each_tile(used, [&](const float* rows, int64_t offset, int64_t count) {
        ask(queries.data(), group, rows, count, dim, shares + offset, width);
    });
    for (int64_t one = 0; one < group; ++one) softmax(shares + one * width, used);
    std::vector<float> totals(group * dim);
    values.each_tile(used, [&](const float* rows, int64_t offset, int64_t count) {
        answer(shares + offset, group, rows, count, dim, totals.data(), width);
    });
    write_outputs<T>(step, sample, kv_head, totals);
}

template <typename T, typename Kind>
void run_quantised(const Step& step) {
    run(step, attend_quantised<T, Kind>);
    for (int64_t sample = 0; Segment<Kind>::WINDOWED && sample < step.batch; ++sample) {
        step.slot_position[sample * step.slots + taken_by_new<Kind>(step, sample)] = static_cast<int32_t>(step.lengths[sample]);
    }
}

}  // namespace

extern "C" void step_int8_float32(const Step* step) { run_quantised<float, Int8>(*step); }

extern "C" void step_int8_bfloat16(const Step* step) { run_quantised<Bfloat16, Int8>(*step); }

extern "C" void step_int4_float32(const Step* step) { run_quantised<float, Int4>(*step); }

extern "C" void step_int4_bfloat16(const Step* step) { run_quantised<Bfloat16, Int4>(*step); }

extern "C" void step_float8_e4m3fn_float32(const Step* step) { run_quantised<float, Float8>(*step); }

extern "C" void step_float8_e4m3fn_bfloat16(const Step* step) { run_quantised<Bfloat16, Float8>(*step); }
