// Stands in for the GPU, so that all of the library but CUDA's own calls runs on a CPU: device.h
// and fft_plan.h in plain C++, with levers for what a test wants to go wrong.
#include <atomic>
#include <complex>
#include <cstring>
#include <map>
#include <thread>
#include <vector>

#include "check_buffers.h"
#include "device.h"
#include "fft_plan.h"

namespace {

constexpr size_t kWorkBytes = 1000;

std::atomic<int> gpu_status{QSM_CUDA_OK};
std::atomic<int> failing_plans{0};
std::atomic<int> living_plans{0};
std::atomic<int> plans_made{0};
std::atomic<bool> capturing{false};

// What each plan is bound to, as cuFFT keeps it: another thread's bind would replace it.
struct Bound {
    void *work;
    std::thread::id thread;
};
std::mutex bound_mutex;
std::map<const qsm::FftPlan *, Bound> bound;

// Overwrites the work area, as a transform does.
qsm::Status use_work(const qsm::FftPlan *plan) {
    const std::lock_guard<std::mutex> lock(bound_mutex);
    if (bound[plan].thread != std::this_thread::get_id()) {
        return qsm::fail(QSM_CUDA_INTERNAL_ERROR, "two threads use one plan at the same time");
    }
    std::memset(bound[plan].work, 0xff, kWorkBytes);
    return QSM_CUDA_OK;
}

using Grid = std::vector<std::complex<double>>;

// The discrete Fourier transform as its definition reads, one axis after the other.
void transform(Grid &grid, const int (&shape)[3], double sign) {
    const size_t strides[] = {size_t(shape[1]) * shape[2], size_t(shape[2]), 1};
    for (int axis = 0; axis < 3; ++axis) {
        const size_t n = shape[axis], stride = strides[axis];
        Grid line(n), factors(n);
        for (size_t i = 0; i < n; ++i) {
            factors[i] = std::polar(1.0, sign * 2 * 3.14159265358979323846 * double(i) / double(n));
        }
        for (size_t first = 0; first < grid.size(); ++first) {
            if (first / stride % n != 0) continue;
            for (size_t i = 0; i < n; ++i) line[i] = grid[first + i * stride];
            for (size_t k = 0; k < n; ++k) {
                std::complex<double> sum = 0;
                for (size_t i = 0; i < n; ++i) sum += line[i] * factors[i * k % n];
                grid[first + k * stride] = sum;
            }
        }
    }
}

}  // namespace

namespace qsm {

Status checked(int, const char *) noexcept { return QSM_CUDA_OK; }

Status require_gpu(int &gpu) {
    gpu = 0;
    const int status = gpu_status;
    return status ? fail(static_cast<Status>(status), "as the test wishes") : QSM_CUDA_OK;
}

Status require_device_memory(std::initializer_list<const void *>, int) { return QSM_CUDA_OK; }

Status is_captured(void *, bool &captured) {
    captured = capturing;
    return QSM_CUDA_OK;
}

Status FftPlan::make(const PlanKey &key, std::shared_ptr<FftPlan> &made) {
    if (failing_plans > 0) {
        --failing_plans;
        return fail(QSM_CUDA_OUT_OF_MEMORY, "out of memory, as the test wishes");
    }
    made.reset(new FftPlan(key));
    made->work_bytes_ = kWorkBytes;
    ++living_plans;
    ++plans_made;
    return QSM_CUDA_OK;
}

FftPlan::~FftPlan() {
    --living_plans;
    const std::lock_guard<std::mutex> lock(bound_mutex);
    bound.erase(this);
}

Status FftPlan::bind(void *work, void *) {
    const std::lock_guard<std::mutex> lock(bound_mutex);
    bound[this] = {work, std::this_thread::get_id()};
    return check_pointer("work", work, QSM_CUDA_WORKSPACE_ALIGNMENT);
}

Status FftPlan::forward(const float *volumes, Complex *spectra) {
    const int shape[] = {key_.x, key_.y, key_.z};
    const size_t rows = size_t(key_.x) * key_.y, half = key_.z / 2 + 1;
    for (int volume = 0; volume < key_.batch; ++volume) {
        Grid grid(volumes, volumes + rows * key_.z);
        transform(grid, shape, -1);
        for (size_t row = 0; row < rows; ++row) {
            for (size_t z = 0; z < half; ++z) {
                const auto value = grid[row * key_.z + z];
                spectra[row * half + z] = {float(value.real()), float(value.imag())};
            }
        }
        volumes += rows * key_.z;
        spectra += rows * half;
    }
    return use_work(this);
}

Status FftPlan::inverse(Complex *spectra, float *volumes) {
    QSM_TRY(use_work(this));
    const int shape[] = {key_.x, key_.y, key_.z};
    const size_t rows = size_t(key_.x) * key_.y, half = key_.z / 2 + 1;
    for (int volume = 0; volume < key_.batch; ++volume) {
        Grid grid(rows * key_.z);
        for (int x = 0; x < key_.x; ++x) {
            for (int y = 0; y < key_.y; ++y) {
                for (int z = 0; z < key_.z; ++z) {
                    const bool stored = size_t(z) < half;
                    const int sx = stored ? x : (key_.x - x) % key_.x;
                    const int sy = stored ? y : (key_.y - y) % key_.y;
                    const int sz = stored ? z : key_.z - z;
                    const Complex &value = spectra[(size_t(sx) * key_.y + sy) * half + sz];
                    grid[(size_t(x) * key_.y + y) * key_.z + z] = {
                        value.re, stored ? value.im : -value.im};
                }
            }
        }
        transform(grid, shape, 1);
        for (const auto &value : grid) *volumes++ = float(value.real());
        // cuFFT destroys its input: nothing may rely on it.
        for (size_t i = 0; i < rows * half; ++i) *spectra++ = {NAN, NAN};
    }
    return QSM_CUDA_OK;
}

}  // namespace qsm

qsm_cuda_status qsm_cuda_probe(qsm_cuda_versions *versions) {
    if (versions) *versions = {0, 0, 0};
    int gpu;
    return qsm::require_gpu(gpu);
}

extern "C" {
QSM_CUDA_API void host_twin_set_gpu(int status) { gpu_status = status; }
QSM_CUDA_API void host_twin_set_capturing(int on) { capturing = on != 0; }
QSM_CUDA_API void host_twin_fail_plans(int count) { failing_plans = count; }
QSM_CUDA_API int host_twin_living_plans(void) { return living_plans; }
QSM_CUDA_API int host_twin_plans_made(void) { return plans_made; }
}
