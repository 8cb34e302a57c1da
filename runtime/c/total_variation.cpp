#include "total_variation.h"

#include <algorithm>
#include <cmath>

#include "dipole_filter.h"

namespace qsm::host {

namespace {

constexpr float kMu3 = 0.01f;
constexpr double kStepPerField = 1;      // alpha / mu1, by how much edges shrink at once, in fields
constexpr double kStartThreshold = 0.2;  // of TKD

inline float clipped(float v, float limit) { return v < -limit ? -limit : v > limit ? limit : v; }

// v = (next - x) step + s1, with s1 clipped out of v.
QSM_WIDE void add_difference(const float *next, const float *x, int32_t n, float step, float limit,
                             float *__restrict v) {
    for (int32_t z = 0; z < n; ++z) v[z] = (next[z] - x[z]) * step + clipped(v[z], limit);
}

// b += weight (q - q_next), q = v - 2 s1.
QSM_WIDE void add_adjoint(const float *v, const float *next, int32_t n, float weight, float limit,
                          float *__restrict b) {
    const auto q = [limit](float u) { return u - 2 * clipped(u, limit); };
    for (int32_t z = 0; z < n; ++z) b[z] += weight * (q(v[z]) - q(next[z]));
}

// q2 = the field where it was measured, q3 = x in the support, else q3 - x; b = mu3 q3.
QSM_WIDE void ask_sources(const float *x, const float *field, const uint8_t *place, int32_t n,
                          float *__restrict q2, float *__restrict q3, float *__restrict b) {
    for (int32_t z = 0; z < n; ++z) {
        q2[z] = place[z] == kMeasured ? field[z] : q2[z];
        q3[z] = place[z] == kBeyond ? q3[z] - x[z] : x[z];
        b[z] = kMu3 * q3[z];
    }
}

}  // namespace

TotalVariation::TotalVariation(const PaddedBox &grid, double alpha, int threads)
    : grid_(grid),
      fft_(grid.geometry.shape, threads),
      row_(fft_.row_floats()),
      plane_(fft_.plane_floats()),
      field_(fft_.floats()),
      place_(grid.places(row_)),
      x_(fft_.floats()),
      b_(fft_.floats()),
      q2_(fft_.floats()),
      q3_(fft_.floats()) {
    for (size_t axis = 0; axis < 3; ++axis) {
        v_[axis].resize(fft_.floats());
        const int32_t n = fft_.shape()[axis];
        const double h = grid.geometry.voxel_size_mm[axis];
        for (int32_t i = 0; i < n; ++i) {
            const double angle = 2 * std::acos(-1.0) * i / n;
            laplacian_[axis].push_back(float((2 - 2 * std::cos(angle)) / (h * h)));
        }
    }
    double squares = 0, voxels = 0;
    grid.over_mask(row_, [&](size_t at, size_t padded) {
        field_[padded] = grid.scan.local_field_ppm[at];
        squares += double(field_[padded]) * field_[padded];
        ++voxels;
    });
    const double limit = kStepPerField * std::sqrt(squares / voxels);
    limit_ = float(limit);
    mu1_ = float(alpha / limit);
}

void TotalVariation::start() {
    x_ = field_;
    d_ = half_multiplier(grid_.geometry, tkd_response(kStartThreshold));
    multiply_spectrum(fft_, x_.data(), d_);
    for (size_t n = 0; n < x_.size(); ++n) x_[n] = place_[n] == kMeasured ? x_[n] : 0;
    q2_ = x_;
    d_ = {};  // first, so that there are not two
    d_ = half_multiplier(grid_.geometry, [](float d) { return d; });
    multiply_spectrum(fft_, q2_.data(), d_);
}

void TotalVariation::run(int32_t iterations, Caller &caller) {
    caller.poll();
    start();
    float before = 0, limit = 0;  // of the duals, which start at zero
    for (int32_t n = 0; n < iterations; ++n) {
        caller.poll();
        fft_.over_planes([&](int32_t plane, int) { update_gradients(plane, before); });
        fft_.over_planes([&](int32_t plane, int worker) {
            ask(plane, limit);
            fft_.forward_plane(&b_[size_t(plane) * plane_], worker);
            fft_.forward_plane(&q2_[size_t(plane) * plane_], worker);
        });
        caller.poll();
        fft_.over_columns({b_.data(), q2_.data()},
                          [&](int32_t y, int32_t z, int32_t count, const Lines *spectra) {
                              solve(y, z, count, spectra);
                          });
        caller.poll();
        fft_.over_planes([&](int32_t plane, int worker) {
            fft_.inverse_plane(&b_[size_t(plane) * plane_], worker);
            fft_.inverse_plane(&q2_[size_t(plane) * plane_], worker);
        });
        x_.swap(b_);
        before = limit;
        limit = limit_;
        caller.done();
    }
}

// v = G x + s1 of a plane, periodic.
void TotalVariation::update_gradients(int32_t plane, float limit) {
    const Shape &n = fft_.shape();
    const double *mm = grid_.geometry.voxel_size_mm;
    const float *after = &x_[size_t((plane + 1) % n[0]) * plane_];
    for (int32_t y = 0; y < n[1]; ++y) {
        const size_t at = size_t(plane) * plane_ + size_t(y) * row_;
        const float *x = &x_[at];
        float *v = &v_[2][at];
        const float step = float(1 / mm[2]), last = v[n[2] - 1];
        add_difference(after + size_t(y) * row_, x, n[2], float(1 / mm[0]), limit, &v_[0][at]);
        add_difference(&x_[size_t(plane) * plane_ + size_t((y + 1) % n[1]) * row_], x, n[2],
                       float(1 / mm[1]), limit, &v_[1][at]);
        add_difference(x + 1, x, n[2] - 1, step, limit, v);
        v[n[2] - 1] = (x[0] - x[n[2] - 1]) * step + clipped(last, limit);
    }
}

// b = mu3 q3 + mu1 G^T q1 and q2 of a plane, q1 = v - 2 s1.
void TotalVariation::ask(int32_t plane, float limit) {
    const Shape &n = fft_.shape();
    const double *mm = grid_.geometry.voxel_size_mm;
    const auto weight = [&](int axis) { return mu1_ * float(1 / mm[axis]); };
    const float *before = &v_[0][size_t((plane ? plane : n[0]) - 1) * plane_];
    for (int32_t y = 0; y < n[1]; ++y) {
        const size_t at = size_t(plane) * plane_ + size_t(y) * row_;
        const float *v = &v_[2][at];
        float *b = &b_[at];
        ask_sources(&x_[at], &field_[at], &place_[at], n[2], &q2_[at], &q3_[at], b);
        add_adjoint(before + size_t(y) * row_, &v_[0][at], n[2], weight(0), limit, b);
        add_adjoint(&v_[1][size_t(plane) * plane_ + size_t((y ? y : n[1]) - 1) * row_], &v_[1][at],
                    n[2], weight(1), limit, b);
        add_adjoint(v, v + 1, n[2] - 1, weight(2), limit, b + 1);
        add_adjoint(v + n[2] - 1, v, 1, weight(2), limit, b);
    }
}

// X = (F b + D F q2) / (D^2 + mu1 L + mu3), and D X.
void TotalVariation::solve(int32_t y, int32_t z, int32_t count, const Lines *spectra) const {
    const Lines &b = spectra[0], &q2 = spectra[1];
    const auto ny = size_t(fft_.shape()[1]), half = size_t(fft_.half());
    const float one_over_n = 1 / float(grid_.geometry.voxels());
    const float *lz = &laplacian_[2][size_t(z)];
    for (int32_t x = 0; x < fft_.shape()[0]; ++x) {
        const float lxy = laplacian_[0][size_t(x)] + laplacian_[1][size_t(y)];
        const float *d = &d_[(size_t(x) * ny + size_t(y)) * half + size_t(z)];
        for (int32_t lane = 0; lane < count; ++lane) {
            const int32_t at = x * kLanes + lane;
            const float normal = d[lane] * d[lane] + mu1_ * (lxy + lz[lane]) + kMu3;
            const float scale = one_over_n / normal;
            b.re[at] = (b.re[at] + d[lane] * q2.re[at]) * scale;
            b.im[at] = (b.im[at] + d[lane] * q2.im[at]) * scale;
            q2.re[at] = d[lane] * b.re[at];
            q2.im[at] = d[lane] * b.im[at];
        }
    }
}

double TotalVariation::last_change() const {
    double change = 0, size = 0;
    for (size_t n = 0; n < x_.size(); ++n) {
        if (n % row_ >= size_t(fft_.shape()[2])) continue;
        change += (double(x_[n]) - b_[n]) * (double(x_[n]) - b_[n]);
        size += double(x_[n]) * x_[n];
    }
    return std::sqrt(change / std::max(size, 1e-60));
}

// The volume of a value of each padded voxel.
template <class Value>
Volume TotalVariation::in_mask(Value &&value) const {
    Volume volume(grid_.scan.geometry.voxels());
    grid_.over_mask(row_, [&](size_t at, size_t padded) { volume[at] = value(padded); });
    return volume;
}

Volume TotalVariation::map() const {
    return in_mask([&](size_t n) { return x_[n]; });
}

Volume TotalVariation::residual() const {
    return in_mask([&](size_t n) { return field_[n] - q2_[n]; });
}

Volume TotalVariation::inner_field() {
    std::fill(b_.begin(), b_.end(), 0.0f);
    grid_.over_mask(row_, [&](size_t, size_t n) { b_[n] = x_[n]; });
    multiply_spectrum(fft_, b_.data(), d_);
    return in_mask([&](size_t n) { return b_[n] + (field_[n] - q2_[n]); });
}

}  // namespace qsm::host
