// What the sources need of C++'s standard library. NVRTC, which compiles them, brings no headers of it.
#pragma once

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
static_assert(sizeof(int16_t) == 2 && sizeof(int32_t) == 4 && sizeof(int64_t) == 8 && sizeof(void*) == 8,
              "integers have the widths of their names");

#define INFINITY __int_as_float(0x7f800000)
#define FLT_MAX 3.402823466e+38f
#define offsetof(type, member) ((uint64_t)__INTADDR__(&(((type*)0)->member)))

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

template <bool kFirst, class A, class B>
struct Conditional {
  using Type = A;
};
template <class A, class B>
struct Conditional<false, A, B> {
  using Type = B;
};
