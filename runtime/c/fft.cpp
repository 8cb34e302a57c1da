#include "fft.h"

#include <algorithm>
#include <cstring>

namespace qsm::host {

namespace {

#define QSM_INLINE inline __attribute__((always_inline))

constexpr int32_t kLargestFactor = 13;  // what is worth a pass of its own

struct Complex {
    float re, im;
};

QSM_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
QSM_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
QSM_INLINE Complex operator*(float s, Complex a) { return {s * a.re, s * a.im}; }
QSM_INLINE Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
QSM_INLINE Complex minus_i(Complex a) { return {a.im, -a.re}; }

template <int R>
QSM_INLINE void butterfly(Complex (&a)[R]) {
    if constexpr (R == 2) {
        const Complex b = a[0] - a[1];
        a[0] = a[0] + a[1];
        a[1] = b;
    } else if constexpr (R == 3) {
        constexpr float sine = 0.866025403784438647f;
        const Complex sum = a[1] + a[2], turned = minus_i(sine * (a[1] - a[2]));
        const Complex rest = a[0] - 0.5f * sum;
        a[0] = a[0] + sum;
        a[1] = rest + turned;
        a[2] = rest - turned;
    } else if constexpr (R == 4) {
        const Complex s = a[0] + a[2], d = a[0] - a[2], t = a[1] + a[3];
        const Complex u = minus_i(a[1] - a[3]);
        a[0] = s + t;
        a[1] = d + u;
        a[2] = s - t;
        a[3] = d - u;
    } else {
        constexpr float c1 = 0.309016994374947424f, s1 = 0.951056516295153572f,
                        c2 = -0.809016994374947424f, s2 = 0.587785252292473129f;
        const Complex p = a[1] + a[4], q = a[2] + a[3], u = a[1] - a[4], v = a[2] - a[3];
        const Complex e = a[0] + c1 * p + c2 * q, f = a[0] + c2 * p + c1 * q;
        const Complex g = minus_i(s1 * u + s2 * v), h = minus_i(s2 * u - s1 * v);
        a[0] = a[0] + p + q;
        a[1] = e + g;
        a[2] = f + h;
        a[3] = f - h;
        a[4] = e - g;
    }
}

// One step of Stockham's algorithm: from (radix, groups, stride) to (groups, radix, stride).
template <int R>
QSM_INLINE void pass(const float *xr, const float *xi, float *yr, float *yi, size_t groups,
                     size_t stride, const float *waves) {
    for (size_t group = 0; group < groups; ++group, waves += 2 * (R - 1)) {
        const float *__restrict in_re = xr + group * stride;
        const float *__restrict in_im = xi + group * stride;
        float *__restrict out_re = yr + R * group * stride;
        float *__restrict out_im = yi + R * group * stride;
#pragma GCC ivdep
        for (size_t q = 0; q < stride; ++q) {
            Complex a[R];
            for (int k = 0; k < R; ++k) {
                const size_t at = q + size_t(k) * groups * stride;
                a[k] = {in_re[at], in_im[at]};
            }
            butterfly<R>(a);
            for (int k = 0; k < R; ++k) {
                if (k) a[k] = Complex{waves[2 * k - 2], waves[2 * k - 1]} * a[k];
                out_re[q + size_t(k) * stride] = a[k].re;
                out_im[q + size_t(k) * stride] = a[k].im;
            }
        }
    }
}

QSM_INLINE void any_pass(const float *xr, const float *xi, float *yr, float *yi, size_t radix,
                         size_t groups, size_t stride, const float *waves, const float *roots) {
    for (size_t group = 0; group < groups; ++group) {
        for (size_t j = 0; j < radix; ++j) {
            float *__restrict re = yr + (radix * group + j) * stride;
            float *__restrict im = yi + (radix * group + j) * stride;
            std::fill_n(re, stride, 0.0f);
            std::fill_n(im, stride, 0.0f);
            for (size_t k = 0; k < radix; ++k) {
                const float *root = roots + 2 * (j * k % radix);
                const Complex w{root[0], root[1]};
                const float *in_re = xr + (k * groups + group) * stride;
                const float *in_im = xi + (k * groups + group) * stride;
                for (size_t q = 0; q < stride; ++q) {
                    const Complex a = w * Complex{in_re[q], in_im[q]};
                    re[q] += a.re;
                    im[q] += a.im;
                }
            }
            if (j == 0) continue;
            const float *wave = waves + 2 * (group * (radix - 1) + j - 1);
            for (size_t q = 0; q < stride; ++q) {
                const Complex a = Complex{wave[0], wave[1]} * Complex{re[q], im[q]};
                re[q] = a.re;
                im[q] = a.im;
            }
        }
    }
}

QSM_WIDE void any_radix(int32_t radix, size_t groups, size_t stride, const float *waves,
                        const float *roots, Lines from, Lines to) {
    switch (radix) {
        case 2:
            return pass<2>(from.re, from.im, to.re, to.im, groups, stride, waves);
        case 3:
            return pass<3>(from.re, from.im, to.re, to.im, groups, stride, waves);
        case 4:
            return pass<4>(from.re, from.im, to.re, to.im, groups, stride, waves);
        case 5:
            return pass<5>(from.re, from.im, to.re, to.im, groups, stride, waves);
        default:
            return any_pass(from.re, from.im, to.re, to.im, size_t(radix), groups, stride, waves,
                            roots);
    }
}

// Appends exp(-2 pi i turns / n).
void append_wave(std::vector<float> &waves, size_t turns, size_t n) {
    const double angle = 2 * std::acos(-1.0) * double(turns % n) / double(n);
    waves.push_back(float(std::cos(angle)));
    waves.push_back(float(-std::sin(angle)));
}

std::vector<int32_t> factors_of(int32_t n) {
    std::vector<int32_t> factors;
    for (int32_t factor : {4, 2, 3, 5}) {
        for (; n % factor == 0; n /= factor) factors.push_back(factor);
    }
    for (int32_t factor = 7; n > 1; factor = factor * factor > n ? n : factor + 2) {
        for (; n % factor == 0; n /= factor) factors.push_back(factor);
    }
    return factors;
}

// a *= w, an element of w for all lanes.
void multiply(Lines a, const std::vector<float> &waves, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const Complex w{waves[2 * i], waves[2 * i + 1]};
        for (size_t at = i * kLanes; at < (i + 1) * kLanes; ++at) {
            const Complex product = w * Complex{a.re[at], a.im[at]};
            a.re[at] = product.re;
            a.im[at] = product.im;
        }
    }
}

// Copies so many lanes; mostly all, which takes one instruction or two.
QSM_INLINE void copy_lanes(const float *from, size_t count, float *to) {
    if (count == kLanes) {
        std::memcpy(to, from, kLanes * sizeof(float));
    } else {
        std::copy_n(from, count, to);
    }
}

Lines lines_at(float *floats, size_t n) { return {floats, floats + n * kLanes}; }

}  // namespace

// Bluestein: i k = (i^2 + k^2 - (i - k)^2) / 2 makes the transform a convolution.
struct LineTransform::Chirp {
    explicit Chirp(size_t n)
        : length(size_t(fast_length(int32_t(2 * n - 1)))), transform(int32_t(length)) {
        for (size_t i = 0; i < n; ++i) append_wave(waves, i * i % (2 * n), 2 * n);
        std::vector<float> padded(transform.scratch_floats() + 2 * length * kLanes);
        const Lines kernel = lines_at(padded.data(), length);
        for (size_t i = 0; i < n; ++i) {
            for (const size_t at : {i, (length - i) % length}) {
                kernel.re[at * kLanes] = waves[2 * i] / float(length);
                kernel.im[at * kLanes] = -waves[2 * i + 1] / float(length);
            }
        }
        transform.forward(kernel, padded.data() + 2 * length * kLanes);
        for (size_t i = 0; i < length; ++i) {
            spectrum.push_back(kernel.re[i * kLanes]);
            spectrum.push_back(kernel.im[i * kLanes]);
        }
    }

    const size_t length;
    const LineTransform transform;
    std::vector<float> waves, spectrum;
};

LineTransform::LineTransform(int32_t n) : n_(size_t(n)) {
    const std::vector<int32_t> factors = factors_of(n);
    if (!factors.empty() && factors.back() > kLargestFactor) {
        chirp_ = std::make_shared<const Chirp>(n_);
        return;
    }
    size_t left = n_, stride = kLanes;
    for (const int32_t factor : factors) {
        const auto radix = size_t(factor);
        Pass next{factor, left / radix, stride, {}, {}};
        for (size_t group = 0; group < next.groups; ++group) {
            for (size_t k = 1; k < radix; ++k) append_wave(next.waves, group * k, left);
        }
        for (size_t k = 0; k < radix; ++k) append_wave(next.roots, k, radix);
        passes_.push_back(std::move(next));
        left /= radix;
        stride *= radix;
    }
}

size_t LineTransform::scratch_floats() const {
    return chirp_ ? 2 * chirp_->length * kLanes + chirp_->transform.scratch_floats()
                  : 2 * n_ * kLanes;
}

void LineTransform::forward(Lines lines, float *scratch) const {
    if (chirp_) {
        by_chirp(lines, scratch);
    } else {
        in_passes(lines, scratch);
    }
}

void LineTransform::in_passes(Lines lines, float *scratch) const {
    Lines from = lines, to = lines_at(scratch, n_);
    for (const Pass &next : passes_) {
        any_radix(next.radix, next.groups, next.stride, next.waves.data(), next.roots.data(), from,
                  to);
        std::swap(from, to);
    }
    if (passes_.size() % 2) {
        std::copy_n(from.re, n_ * kLanes, lines.re);
        std::copy_n(from.im, n_ * kLanes, lines.im);
    }
}

void LineTransform::by_chirp(Lines lines, float *scratch) const {
    const size_t length = chirp_->length, used = n_ * kLanes;
    const Lines padded = lines_at(scratch, length);
    float *more = scratch + 2 * length * kLanes;
    multiply(lines, chirp_->waves, n_);
    std::fill_n(scratch, 2 * length * kLanes, 0.0f);
    std::copy_n(lines.re, used, padded.re);
    std::copy_n(lines.im, used, padded.im);
    chirp_->transform.forward(padded, more);
    multiply(padded, chirp_->spectrum, length);
    chirp_->transform.forward({padded.im, padded.re}, more);
    std::copy_n(padded.re, used, lines.re);
    std::copy_n(padded.im, used, lines.im);
    multiply(lines, chirp_->waves, n_);
}

Fft::Fft(const Shape &shape, int threads)
    : shape_(shape),
      half_(shape[2] / 2 + 1),
      workers_(threads),
      x_(shape[0]),
      y_(shape[1]),
      z_(shape[2]) {
    const auto longest = size_t(*std::max_element(shape.begin(), shape.end()));
    scratch_floats_ = 2 * kMostSpectra * longest * kLanes +
                      std::max({x_.scratch_floats(), y_.scratch_floats(), z_.scratch_floats()});
    scratch_.resize(size_t(workers_.count()) * scratch_floats_);
}

void Fft::forward_plane(float *plane, int worker) {
    const auto nz = size_t(shape_[2]), half = size_t(half_);
    float *const more = scratch(worker) + 2 * nz * kLanes;
    const Lines lines = lines_at(scratch(worker), nz);
    // A lane is two rows, one of them in the imaginary part.
    for (int32_t first = 0; first < shape_[1]; first += 2 * kLanes) {
        const int32_t rows = std::min(shape_[1] - first, 2 * kLanes);
        float *const block = plane + size_t(first) * row_floats();
        if (rows < 2 * kLanes) std::fill_n(lines.re, 2 * nz * kLanes, 0.0f);
        for (int32_t row = 0; row < rows; ++row) {
            const float *from = block + size_t(row) * row_floats();
            float *to = (row % 2 ? lines.im : lines.re) + row / 2;
            for (size_t z = 0; z < nz; ++z) to[z * kLanes] = from[z];
        }
        z_.forward(lines, more);
        for (int32_t row = 0; row < rows; ++row) {
            const size_t lane = size_t(row) / 2;
            float *re = block + size_t(row) * row_floats(), *im = re + half;
            for (size_t k = 0; k < half; ++k) {
                const size_t at = k * kLanes + lane, mirrored = (k ? nz - k : 0) * kLanes + lane;
                const Complex a{lines.re[at], lines.im[at]};
                const Complex b{lines.re[mirrored], -lines.im[mirrored]};
                const Complex part = row % 2 ? minus_i(a - b) : a + b;
                re[k] = 0.5f * part.re;
                im[k] = 0.5f * part.im;
            }
        }
    }
    along_y(plane, false, scratch(worker));
}

void Fft::inverse_plane(float *plane, int worker) {
    along_y(plane, true, scratch(worker));
    const auto nz = size_t(shape_[2]), half = size_t(half_);
    float *const more = scratch(worker) + 2 * nz * kLanes;
    const Lines lines = lines_at(scratch(worker), nz);
    for (int32_t first = 0; first < shape_[1]; first += 2 * kLanes) {
        const int32_t rows = std::min(shape_[1] - first, 2 * kLanes);
        float *const block = plane + size_t(first) * row_floats();
        std::fill_n(lines.re, 2 * nz * kLanes, 0.0f);
        for (int32_t row = 0; row < rows; ++row) {
            const size_t lane = size_t(row) / 2;
            const float *re = block + size_t(row) * row_floats(), *im = re + half;
            for (size_t k = 0; k < half; ++k) {
                const size_t mirrored = k ? nz - k : 0;
                const Complex a{re[k], mirrored == k ? 0 : im[k]};
                const Complex part = row % 2 ? Complex{-a.im, a.re} : a;  // i a
                const Complex other = row % 2 ? Complex{a.im, a.re} : Complex{a.re, -a.im};
                lines.re[k * kLanes + lane] += part.re;
                lines.im[k * kLanes + lane] += part.im;
                if (mirrored == k) continue;
                lines.re[mirrored * kLanes + lane] += other.re;
                lines.im[mirrored * kLanes + lane] += other.im;
            }
        }
        z_.forward({lines.im, lines.re}, more);
        for (int32_t row = 0; row < rows; ++row) {
            const float *from = (row % 2 ? lines.im : lines.re) + row / 2;
            float *to = block + size_t(row) * row_floats();
            for (size_t z = 0; z < nz; ++z) to[z] = from[z * kLanes];
        }
    }
}

void Fft::forward_planes(float *volume) {
    over_planes([&](int32_t x, int worker) {
        forward_plane(volume + size_t(x) * plane_floats(), worker);
    });
}

void Fft::inverse_planes(float *volume) {
    over_planes([&](int32_t x, int worker) {
        inverse_plane(volume + size_t(x) * plane_floats(), worker);
    });
}

void Fft::along_y(float *plane, bool inverse, float *scratch) const {
    const auto ny = size_t(shape_[1]), half = size_t(half_);
    const Lines lines = lines_at(scratch, ny);
    for (size_t z = 0; z < half; z += kLanes) {
        const size_t count = std::min<size_t>(kLanes, half - z);
        for (size_t y = 0; y < ny; ++y) {
            const float *from = plane + y * row_floats() + z;
            copy_lanes(from, count, lines.re + y * kLanes);
            copy_lanes(from + half, count, lines.im + y * kLanes);
        }
        y_.forward(inverse ? Lines{lines.im, lines.re} : lines, scratch + 2 * ny * kLanes);
        for (size_t y = 0; y < ny; ++y) {
            float *to = plane + y * row_floats() + z;
            copy_lanes(lines.re + y * kLanes, count, to);
            copy_lanes(lines.im + y * kLanes, count, to + half);
        }
    }
}

void Fft::over_columns(const std::vector<float *> &volumes, const Product &product) {
    const auto nx = size_t(shape_[0]), half = size_t(half_);
    workers_.over(shape_[1], [&](int32_t y, int worker) {
        Lines spectra[kMostSpectra];
        for (size_t n = 0; n < volumes.size(); ++n) {
            spectra[n] = lines_at(scratch(worker) + 2 * n * nx * kLanes, nx);
        }
        float *const more = scratch(worker) + 2 * volumes.size() * nx * kLanes;
        for (size_t z = 0; z < half; z += kLanes) {
            const size_t count = std::min<size_t>(kLanes, half - z);
            const size_t first = size_t(y) * row_floats() + z;
            for (size_t n = 0; n < volumes.size(); ++n) {
                for (size_t x = 0; x < nx; ++x) {
                    const float *from = volumes[n] + x * plane_floats() + first;
                    copy_lanes(from, count, spectra[n].re + x * kLanes);
                    copy_lanes(from + half, count, spectra[n].im + x * kLanes);
                }
                x_.forward(spectra[n], more);
            }
            product(y, int32_t(z), int32_t(count), spectra);
            for (size_t n = 0; n < volumes.size(); ++n) {
                x_.forward({spectra[n].im, spectra[n].re}, more);
                for (size_t x = 0; x < nx; ++x) {
                    float *to = volumes[n] + x * plane_floats() + first;
                    copy_lanes(spectra[n].re + x * kLanes, count, to);
                    copy_lanes(spectra[n].im + x * kLanes, count, to + half);
                }
            }
        }
    });
}

int32_t fast_length(int32_t n) {
    for (std::vector<int32_t> f = factors_of(n); !f.empty() && f.back() > 5; f = factors_of(++n)) {}
    return n;
}

}  // namespace qsm::host
