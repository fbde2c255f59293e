// Quantised rows: `ops/cache/quantising.py` and `ops/cache/rows.py` say what is in one. The codes of a token and head, then the
// low bytes of scale and zero point, then the high ones.

namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline float from_half(uint16_t half) {
#if defined(__F16C__) && defined(__AVX2__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
    float wide;
    if (rest < 0x0400) {
        wide = static_cast<float>(rest) * 0x1p-24f;
    } else {
        const uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x03ff) << 13 : (rest << 13) + (112u << 23);
        std::memcpy(&wide, &bits, sizeof wide);
    }
    return sign ? -wide : wide;
#endif
}

inline uint16_t to_half(float number) {  // to the nearest, ties to even; infinite beyond what it holds
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {
        float size;
        std::memcpy(&size, &bits, sizeof size);
        return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
    }
    return sign | static_cast<uint16_t>((bits + 0x0fff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

inline Integers widened(const uint8_t* from) {
#if defined(__AVX512F__) || defined(__AVX2__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
#ifdef __AVX512F__
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
#else
    const __m256i wide[2] = {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
#endif
    Integers lanes;
    std::memcpy(&lanes, &wide, sizeof lanes);
    return lanes;
#else
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    // One doubling after the other: of both at once GCC makes one lane after the other.
    return __builtin_convertvector(__builtin_convertvector(bytes, Halves), Integers);
#endif
}

// What each kind of code is: `LARGEST`, whether there is a zero point, how many bytes `dim` channels take, and how they are read
// and written. `read_part` reads the codes of `LANES` bytes at `part` and hands them on by their channels.

struct Int8 {
    static constexpr float LARGEST = 255.0f;
    static constexpr bool ZERO = true;
    static int64_t bytes(int64_t dim) { return dim; }
    template <typename Put>
    static void read_part(const uint8_t* row, int64_t, int64_t part, Put put) {
        put(part, __builtin_convertvector(widened(row + part), Vector));
    }
    static float read(const uint8_t* row, int64_t, int64_t channel) { return row[channel]; }
    static void write(float step, uint8_t* row, int64_t, int64_t channel) {
        row[channel] = static_cast<uint8_t>(std::min(std::max(std::nearbyint(step), 0.0f), LARGEST));
    }
};

struct Int4 {
    static constexpr float LARGEST = 15.0f;
    static constexpr bool ZERO = true;
    static int64_t bytes(int64_t dim) { return dim / 2; }
    template <typename Put>
    static void read_part(const uint8_t* row, int64_t dim, int64_t part, Put put) {
        const Integers both = widened(row + part);
        put(part, __builtin_convertvector(both & 15, Vector));
        put(part + dim / 2, __builtin_convertvector(both >> 4, Vector));
    }
    static float read(const uint8_t* row, int64_t dim, int64_t channel) {
        return channel < dim / 2 ? row[channel] & 15 : row[channel - dim / 2] >> 4;
    }
    static void write(float step, uint8_t* row, int64_t dim, int64_t channel) {
        const uint8_t code = static_cast<uint8_t>(std::min(std::max(std::nearbyint(step), 0.0f), LARGEST));
        if (channel < dim / 2) {
            row[channel] = code;  // the low half comes first, and clears the byte
        } else {
            row[channel - dim / 2] |= static_cast<uint8_t>(code << 4);
        }
    }
};

struct Float8 {  // e4m3fn
    static constexpr float LARGEST = 448.0f;
    static constexpr bool ZERO = false;
    static int64_t bytes(int64_t dim) { return dim; }
    template <typename Put>
    static void read_part(const uint8_t* row, int64_t, int64_t part, Put put) {
        const Integers codes = widened(row + part), sizes = codes & 0x7f;
        const Integers normal = (sizes << 20) + (120 << 23);
        Vector lanes, small = __builtin_convertvector(sizes, Vector) * 0x1p-9f;
        std::memcpy(&lanes, &normal, sizeof lanes);
        lanes = sizes < 8 ? small : lanes;
        put(part, (codes & 0x80) != 0 ? -lanes : lanes);
    }
    static float read(const uint8_t* row, int64_t, int64_t channel) {
        const uint32_t size = row[channel] & 0x7f, bits = (size << 20) + (120u << 23);
        float wide;
        std::memcpy(&wide, &bits, sizeof wide);
        if (size < 8) wide = static_cast<float>(size) * 0x1p-9f;
        return row[channel] & 0x80 ? -wide : wide;
    }
    static void write(float step, uint8_t* row, int64_t, int64_t channel) {
        const float size = std::min(std::fabs(step), LARGEST);
        uint32_t bits;
        std::memcpy(&bits, &size, sizeof bits);
        const uint32_t code = size < 0x1p-6f ? static_cast<uint32_t>(std::nearbyint(size * 0x1p9f))
                                             : (bits + 0x7ffff + (bits >> 20 & 1) - (120u << 23)) >> 20;
        row[channel] = static_cast<uint8_t>(code | (std::signbit(step) ? 0x80 : 0));
    }
};

template <typename Kind>
inline int64_t row_bytes(int64_t dim) {
    return Kind::bytes(dim) + 4;
}

template <typename Kind>
void quantise(const float* values, int64_t dim, uint8_t* row) {
    float low = values[0], high = values[0];
    bool finite = true;
    for (int64_t channel = 0; channel < dim; ++channel) {
        finite = finite && std::isfinite(values[channel]);
        low = std::min(low, values[channel]);
        high = std::max(high, values[channel]);
    }
    uint16_t zero_bits = Kind::ZERO ? to_half(low) : 0;
    const float zero = from_half(zero_bits);
    const float reach = Kind::ZERO ? std::max(high - zero, 0.0f) : std::max(high, -low);
    const uint16_t scale_bits = to_half(reach / Kind::LARGEST);
    const float scale = from_half(scale_bits);
    finite = finite && std::isfinite(scale);
    for (int64_t channel = 0; channel < dim; ++channel) {
        Kind::write(finite ? (values[channel] - zero) / (scale == 0.0f ? 1.0f : scale) : 0.0f, row, dim, channel);
    }
    if (!finite) zero_bits = 0x7e00;  // then all of it is read as NaN
    const uint16_t parameters[2] = {scale_bits, zero_bits};
    uint8_t* behind = row + Kind::bytes(dim);
    for (int64_t which = 0; which < 2; ++which) {
        behind[which] = static_cast<uint8_t>(parameters[which]);
        behind[2 + which] = static_cast<uint8_t>(parameters[which] >> 8);
    }
}

template <typename Kind>
inline void dequantise(const uint8_t* row, int64_t dim, float* values) {
    const int64_t bytes = Kind::bytes(dim);
    const uint8_t* behind = row + bytes;
    const float scale = from_half(static_cast<uint16_t>(behind[0] | behind[2] << 8));
    const float zero = from_half(static_cast<uint16_t>(behind[1] | behind[3] << 8));
    int64_t part = 0;
    for (; part + LANES <= bytes; part += LANES) {
        Kind::read_part(row, dim, part, [&](int64_t channel, Vector codes) {
            const Vector read = codes * scale + zero;
            std::memcpy(values + channel, &read, sizeof read);
        });
    }
    for (; part < bytes; ++part) {
        for (int64_t channel = part; channel < dim; channel += bytes) values[channel] = Kind::read(row, dim, channel) * scale + zero;
    }
}

// In place: blocks of the largest power of two that divides `dim` times a Hadamard matrix over the square root of its size.
inline void rotate(float* values, int64_t dim) {
    const int64_t size = dim & -dim;
    for (int64_t half = 1; half < size; half *= 2) {
        for (int64_t first = 0; first < dim; first += 2 * half) {
            for (int64_t at = first; at < first + half; ++at) {
                const float one = values[at], other = values[at + half];
                values[at] = one + other;
                values[at + half] = one - other;
            }
        }
    }
    const float share = 1.0f / std::sqrt(static_cast<float>(size));
    for (int64_t at = 0; at < dim; ++at) values[at] *= share;
}

}  // namespace
