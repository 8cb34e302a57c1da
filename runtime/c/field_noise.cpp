#include "field_noise.h"

#include <algorithm>
#include <cmath>

#include "dipole_filter.h"

namespace qsm::host {

namespace {

constexpr float kNearCone = 0.03f;           // |D| below it
constexpr double kBand[] = {0.8, 1.7};       // of the Nyquist frequency of the longest edge
constexpr double kLeastShare = 0.02;         // of the field's deviation
constexpr double kEdgesPerNoise = 23;        // alpha = sigma h / this

double median(std::vector<float> values) {
    const auto middle = values.begin() + ptrdiff_t(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    if (values.size() % 2) return *middle;
    return 0.5f * (*middle + *std::max_element(values.begin(), middle));
}

// |F|^2 on the half spectrum of a volume with the transform's room between rows.
Volume power_of(Fft &fft, float *volume) {
    const auto ny = size_t(fft.shape()[1]), half = size_t(fft.half());
    Volume power(size_t(fft.shape()[0]) * ny * half);
    fft.forward_planes(volume);
    fft.over_columns({volume}, [&](int32_t y, int32_t z, int32_t count, const Lines *spectrum) {
        for (int32_t x = 0; x < fft.shape()[0]; ++x) {
            float *to = &power[(size_t(x) * ny + size_t(y)) * half + size_t(z)];
            for (int32_t lane = 0; lane < count; ++lane) {
                const float re = spectrum->re[x * kLanes + lane];
                const float im = spectrum->im[x * kLanes + lane];
                to[lane] = re * re + im * im;
            }
        }
    });
    return power;
}

}  // namespace

double field_noise(const Scan &scan, const Box &box, int threads) {
    Geometry cropped = scan.geometry;
    for (size_t axis = 0; axis < 3; ++axis) cropped.shape[axis] = box[axis].stop - box[axis].start;
    const Shape &n = cropped.shape, &whole = scan.geometry.shape;
    Fft fft(n, threads);
    Volume field(fft.floats());
    const auto over_mask = [&](auto &&body) {  // there is nothing of it outside its box
        for (int32_t x = 0; x < n[0]; ++x) {
            for (int32_t y = 0; y < n[1]; ++y) {
                const size_t from = (size_t(x + box[0].start) * size_t(whole[1]) +
                                     size_t(y + box[1].start)) *
                                        size_t(whole[2]) +
                                    size_t(box[2].start);
                float *to = &field[size_t(x) * fft.plane_floats() + size_t(y) * fft.row_floats()];
                for (size_t z = 0; z < size_t(n[2]); ++z) {
                    if (scan.mask[from + z]) body(scan.local_field_ppm[from + z], to[z]);
                }
            }
        }
    };
    double count = 0, sum = 0, squares = 0;
    over_mask([&](float value, float &) {
        ++count;
        sum += value;
    });
    const auto mean = float(sum / count);
    over_mask([&](float value, float &to) {
        to = value - mean;
        squares += double(to) * to;
    });

    const Volume power = power_of(fft, field.data());
    const Volume dipole = half_multiplier(cropped, [](float d) { return d; });
    const double *mm = cropped.voxel_size_mm;
    const double nyquist = 0.5 / *std::max_element(mm, mm + 3);
    const auto least = float(kBand[0] * nyquist), most = float(kBand[1] * nyquist);
    const auto squared = [&](int32_t i, int axis) {
        const double k = frequency(i, n[size_t(axis)], mm[axis]);
        return k * k;
    };
    std::vector<float> noise;
    size_t at = 0;
    for (int32_t x = 0; x < n[0]; ++x) {
        for (int32_t y = 0; y < n[1]; ++y) {
            const double xy = squared(x, 0) + squared(y, 1);
            for (int32_t z = 0; z < fft.half(); ++z, ++at) {
                if (!(std::fabs(dipole[at]) < kNearCone)) continue;
                const float k = std::sqrt(float(xy + squared(z, 2)));
                if (k > least && k < most) noise.push_back(power[at]);
            }
        }
    }
    // |F|^2 of white noise is exponential: its median is ln 2 times its mean.
    const double sigma =
        noise.empty() ? 0 : std::sqrt(median(std::move(noise)) / std::log(2.0) / count);
    return std::max(sigma, kLeastShare * std::sqrt(squares / count));
}

double alpha_of_noise(double sigma_ppm, const Geometry &geometry) {
    const double *mm = geometry.voxel_size_mm;
    return sigma_ppm * std::cbrt(mm[0] * mm[1] * mm[2]) / kEdgesPerNoise;
}

}  // namespace qsm::host
