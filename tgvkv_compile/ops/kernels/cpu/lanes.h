// Numbers of the dtypes that kernels take, and vectors of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;
// Vectors of GCC and Clang, which become whatever registers the processor has.
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct Bfloat16 {
    uint16_t bits;
};

inline float read(const float* from) { return *from; }

inline float read(const Bfloat16* from) {
    const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline Vector read_lanes(const float* from) {
    Vector lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline Vector read_lanes(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Vector lanes;
    std::memcpy(&lanes, &words, sizeof lanes);
    return lanes;
}

template <typename T>
inline void read_scaled(const T* from, int64_t count, double scale, float* to) {
    for (int64_t at = 0; at < count; ++at) to[at] = read(from + at) * static_cast<float>(scale);
}

inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline void write(float number, float* to) { *to = number; }

inline void write(float number, Bfloat16* to) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    to->bits = number != number ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(Vector lanes) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    static_assert(LANES == 16);
    Eight eight[2];
    Four four[2];
    std::memcpy(eight, &lanes, sizeof lanes);
    eight[0] += eight[1];
    std::memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][1]) + (four[0][2] + four[0][3]);
}

// exp of numbers that are not above 0, to about an ulp: 2^n times a polynomial (Cephes' expf); 0 below what float32 holds.
inline Vector exp_lanes(Vector x) {
    const Vector low = Vector{} - 87.0f;
    const Integers under = x < low;
    x = under ? low : x;
    const Integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
    const Vector whole = __builtin_convertvector(n, Vector);
    const Vector rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Vector power = Vector{} + 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const Integers shifted = (n + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &shifted, sizeof scale);
    return under ? Vector{} : power * scale;
}

}  // namespace
