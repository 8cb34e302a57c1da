// Sums and products of vectors, the coefficients in the GPU's memory: what conjugate gradients need.
#ifndef QSM_VECTOR_ROWS_H
#define QSM_VECTOR_ROWS_H

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "qsm_cuda.h"

namespace qsm {

// Elements of a vector are taken in rows of this length, neighbours by neighbouring threads.
constexpr int32_t kVectorRow = 1024;

inline int32_t vector_rows(int64_t count) {
    return static_cast<int32_t>((count + kVectorRow - 1) / kVectorRow);
}

// y = a x + b y.
struct Combine {
    int64_t count;
    qsm_cuda_coefficient a, b;
    const float *x;
    float *y;

    struct Row {
        const Combine &all;
        int64_t first;
        float a, b;

        QSM_HOST_DEVICE void operator()(int32_t column) const {
            const int64_t index = first + column;
            if (index < all.count) all.y[index] = a * all.x[index] + b * all.y[index];
        }
    };

    // Nothing over nothing is nothing: where a residual is 0 there is no step left to take.
    static QSM_HOST_DEVICE float value_of(const qsm_cuda_coefficient &c) {
        if (!c.numerator) return c.factor;
        const double ratio = *c.denominator == 0 ? 0 : *c.numerator / *c.denominator;
        return c.factor * static_cast<float>(ratio);
    }

    QSM_HOST_DEVICE int32_t columns() const { return kVectorRow; }

    QSM_HOST_DEVICE Row row(int32_t index) const {
        return {*this, int64_t{index} * kVectorRow, value_of(a), value_of(b)};
    }
};

// A sum in three steps, always in the same order, so that results repeat exactly: each of
// kFirstSums takes every kFirstSums-th term, each of kSecondSums the same of those, one the rest.
constexpr int32_t kLanes = 32;
constexpr int32_t kFirstSums = 2048 * kLanes;
constexpr int32_t kSecondSums = 8 * kLanes;

struct Product {
    const float *x, *y;

    QSM_HOST_DEVICE double operator()(int64_t i) const { return static_cast<double>(x[i]) * y[i]; }
};

struct Beyond {
    const float *x;
    float limit;

    QSM_HOST_DEVICE double operator()(int64_t i) const { return fabsf(x[i]) > limit ? 1 : 0; }
};

template <class Term>
struct FirstSums {
    int64_t count;
    Term term;
    double *sums;

    struct Row {
        const FirstSums &all;
        int32_t first;

        QSM_HOST_DEVICE void operator()(int32_t column) const {
            const int32_t mine = first + column;
            double sum = 0;
            for (int64_t i = mine; i < all.count; i += kFirstSums) sum += all.term(i);
            all.sums[mine] = sum;
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return kLanes; }
    QSM_HOST_DEVICE Row row(int32_t index) const { return {*this, index * kLanes}; }
};

struct LastSums {
    int32_t count, apart, lanes;  // of the sums that are left; how many of the next there are
    const double *from;
    double *to;

    struct Row {
        const LastSums &all;
        int32_t first;

        QSM_HOST_DEVICE void operator()(int32_t column) const {
            const int32_t mine = first + column;
            double sum = 0;
            for (int32_t i = mine; i < all.count; i += all.apart) sum += all.from[i];
            all.to[mine] = sum;
        }
    };

    QSM_HOST_DEVICE int32_t columns() const { return lanes; }
    QSM_HOST_DEVICE Row row(int32_t index) const { return {*this, index * lanes}; }
};

}  // namespace qsm

#endif
