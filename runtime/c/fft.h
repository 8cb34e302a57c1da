// The transform of real volumes of one shape, in place, along any axis lengths.
#ifndef QSM_RUNTIME_FFT_H
#define QSM_RUNTIME_FFT_H

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "scan.h"
#include "workers.h"

namespace qsm::host {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// Compiled for what processors can, one of which is chosen when the library is loaded.
#define QSM_WIDE __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define QSM_WIDE
#endif

constexpr int32_t kLanes = 16;  // lines that are transformed at a time, side by side

// Complex lines, element i of lane l at i * kLanes + l.
struct Lines {
    float *re, *im;
};

// The complex transform of lines of one length.
class LineTransform {
  public:
    explicit LineTransform(int32_t n);

    size_t scratch_floats() const;

    // The inverse, times the length, is the forward transform with the parts swapped.
    void forward(Lines lines, float *scratch) const;

  private:
    struct Pass {
        int32_t radix;
        size_t groups, stride;    // stride in floats
        std::vector<float> waves; // cos and sin, (groups, radix - 1, 2)
        std::vector<float> roots; // of unity, (radix, 2), where no butterfly is written for it
    };
    struct Chirp;

    void in_passes(Lines lines, float *scratch) const;
    void by_chirp(Lines lines, float *scratch) const;

    const size_t n_;
    std::vector<Pass> passes_;
    std::shared_ptr<const Chirp> chirp_;  // for lengths with a large prime factor
};

// Volumes have room between rows for half a spectrum: row_floats() from one to the next. A row of
// the spectrum is the real parts of its z / 2 + 1 frequencies, then the imaginary ones.
class Fft {
  public:
    Fft(const Shape &shape, int threads);

    const Shape &shape() const { return shape_; }
    int32_t half() const { return half_; }
    size_t row_floats() const { return 2 * size_t(half_); }
    size_t plane_floats() const { return row_floats() * size_t(shape_[1]); }
    size_t floats() const { return plane_floats() * size_t(shape_[0]); }

    // body(x, worker) for all planes, on all threads.
    void over_planes(const std::function<void(int32_t, int)> &body) {
        workers_.over(shape_[0], body);
    }

    // Transforms a plane along z and y; and back, times the plane's voxels.
    void forward_plane(float *plane, int worker);
    void inverse_plane(float *plane, int worker);

    void forward_planes(float *volume);
    void inverse_planes(float *volume);

    // What is done to spectra of up to kMostSpectra volumes at some columns along x: the lines are
    // at y and at z, z + 1 .. to z + count.
    using Product = std::function<void(int32_t y, int32_t z, int32_t count, const Lines *spectra)>;
    static constexpr size_t kMostSpectra = 2;

    // Transforms along x, lets `product` change the spectra, and transforms back, times the length.
    void over_columns(const std::vector<float *> &volumes, const Product &product);

  private:
    float *scratch(int worker) { return scratch_.data() + size_t(worker) * scratch_floats_; }
    void along_y(float *plane, bool inverse, float *scratch) const;

    const Shape shape_;
    const int32_t half_;
    Workers workers_;
    const LineTransform x_, y_, z_;
    size_t scratch_floats_;
    Volume scratch_;
};

// Returns the next length whose prime factors are 2, 3 and 5.
int32_t fast_length(int32_t n);

}  // namespace qsm::host

#endif
