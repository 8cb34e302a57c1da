#include "data_consistency.h"

#include "dipole_filter.h"
#include "k_space.h"
#include "padded_box.h"

namespace qsm::host {

namespace {

double squared_norm(const Volume &v) {
    double sum = 0;
    for (const float value : v) sum += double(value) * value;
    return sum;
}

double dot(const Volume &a, const Volume &b) {
    double sum = 0;
    for (size_t n = 0; n < a.size(); ++n) sum += double(a[n]) * b[n];
    return sum;
}

void multiply(Volume &volume, const std::vector<uint8_t> &mask) {
    for (size_t n = 0; n < volume.size(); ++n) volume[n] *= float(mask[n]);
}

// a += weight b
void add(Volume &a, float weight, const Volume &b) {
    for (size_t n = 0; n < a.size(); ++n) a[n] += weight * b[n];
}

void closed_form(Volume &chi, const Scan &scan, float weight, DipoleFilter &filter) {
    chi = filter.apply(chi, filter.multiplier(Multiplier{QSM_CUDA_TIKHONOV_PRIOR, weight}));
    const Volume inverse = filter.multiplier(Multiplier{QSM_CUDA_TIKHONOV, weight});
    add(chi, 1, filter.apply(scan.local_field_ppm, inverse));
    multiply(chi, scan.mask);
}

// Sources just outside the mask are sought too, free of the weight: they take up what background
// removal left behind.
void conjugate_gradients(Volume &chi, const Scan &scan, float weight, int32_t iterations,
                         int threads, Caller &caller) {
    const PaddedBox grid(scan);
    Fft fft(grid.geometry.shape, threads);
    const size_t row = fft.row_floats();
    const std::vector<uint8_t> places = grid.places(row);
    const Volume dipole = half_multiplier(grid.geometry, [](float d) { return d; });
    const auto convolve = [&](Volume &x, Place outermost) {
        multiply_spectrum(fft, x.data(), dipole);
        for (size_t n = 0; n < x.size(); ++n) x[n] = places[n] <= outermost ? x[n] : 0;
    };
    Volume x(fft.floats()), r(fft.floats());
    grid.over_mask(row, [&](size_t at, size_t padded) { x[padded] = chi[at]; });
    Volume image = x;
    convolve(image, kMeasured);
    grid.over_mask(row, [&](size_t at, size_t padded) {
        r[padded] = scan.local_field_ppm[at] - image[padded];
    });
    convolve(r, kSupport);
    Volume direction = r;
    double squared = squared_norm(r);
    const double first = squared;
    for (int32_t n = 0; n < iterations && squared > kSolved * first; ++n) {
        caller.poll();
        image = direction;
        convolve(image, kMeasured);
        convolve(image, kSupport);
        for (size_t i = 0; i < image.size(); ++i) {
            if (places[i] == kMeasured) image[i] += weight * direction[i];
        }
        const auto length = float(squared / dot(direction, image));
        add(x, length, direction);
        add(r, -length, image);
        const double before = squared;
        squared = squared_norm(r);
        const auto ratio = float(squared / before);
        for (size_t i = 0; i < r.size(); ++i) direction[i] = direction[i] * ratio + r[i];
        caller.done();
    }
    grid.over_mask(row, [&](size_t at, size_t padded) { chi[at] = x[padded]; });
}

}  // namespace

void make_consistent(Volume &chi_ppm, const Scan &scan, double lambda, int32_t iterations,
                     int threads, Caller &caller) {
    const auto weight = static_cast<float>(lambda);
    if (iterations) {
        conjugate_gradients(chi_ppm, scan, weight, iterations, threads, caller);
    } else {
        caller.poll();
        DipoleFilter filter(scan.geometry, kCorrectionPadVoxels, threads);
        closed_form(chi_ppm, scan, weight, filter);
    }
}

}  // namespace qsm::host
