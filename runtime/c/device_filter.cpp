#include "device_filter.h"

#include "data_consistency.h"
#include "padded_box.h"

namespace qsm::host {

namespace {

qsm_cuda_dipole operator_on(const Geometry &grid) {
    qsm_cuda_dipole op{};
    op.batch = 1;
    for (size_t axis = 0; axis < 3; ++axis) {
        op.shape[axis] = grid.shape[axis];
        op.voxel_size_mm[axis] = grid.voxel_size_mm[axis];
        op.b0_direction[axis] = grid.b0_direction[axis];
    }
    op.multiplier = QSM_CUDA_DIPOLE;
    op.tkd_threshold = op.tikhonov_lambda = 0.1;
    return op;
}

size_t workspace_for(const Gpu &gpu, const qsm_cuda_dipole &op) {
    size_t bytes = 0;
    gpu.check(gpu.dipole_workspace(&op, &bytes));
    return bytes;
}

// A box of `size` that begins at `start` in a volume of `volume`.
qsm_cuda_patch box_of(const Shape &volume, int32_t start, const Shape &size) {
    return {
        1, {volume[0], volume[1], volume[2]}, {start, start, start}, {size[0], size[1], size[2]}};
}

// y = M crop(F^-1 [E F pad(x)]) with zeros around x, enqueued on one stream.
class DeviceFilter {
  public:
    DeviceFilter(const Gpu &gpu, const Scan &scan, void *stream)
        : gpu_(gpu), stream_(stream), memory_(gpu) {
        constexpr int32_t pad = kCorrectionPadVoxels;
        const Shape &shape = scan.geometry.shape;
        const Geometry grid = scan.geometry.padded(pad);
        operator_ = operator_on(grid);
        grow_ = box_of(shape, -pad, grid.shape);
        crop_ = box_of(grid.shape, pad, shape);
        workspace_bytes_ = workspace_for(gpu, operator_);
        padded_ = memory_.make<float>(grid.voxels());
        padded_mask_ = memory_.make<uint8_t>(grid.voxels());
        workspace_ = memory_.make<uint8_t>(workspace_bytes_);
        std::vector<uint8_t> mask(grid.voxels());
        const uint8_t *row = scan.mask.data();
        for (int32_t x = 0; x < shape[0]; ++x) {
            for (int32_t y = 0; y < shape[1]; ++y, row += shape[2]) {
                const size_t at = size_t(x + pad) * size_t(grid.shape[1]) + size_t(y + pad);
                std::copy_n(row, shape[2], &mask[at * size_t(grid.shape[2]) + size_t(pad)]);
            }
        }
        gpu_.upload(padded_mask_, mask.data(), mask.size(), stream_);
        gpu_.wait(stream_);  // the mask here goes
    }

    // What it allocates.
    static double bytes(const Gpu &gpu, const Geometry &geometry) {
        const Geometry grid = geometry.padded(kCorrectionPadVoxels);
        return double(sizeof(float) + 1) * double(grid.voxels()) +
               double(workspace_for(gpu, operator_on(grid)));
    }

    // `y` may be `x`.
    void apply(qsm_cuda_multiplier multiplier, double lambda, const float *x, float *y) {
        operator_.multiplier = multiplier;
        operator_.tikhonov_lambda = lambda;
        gpu_.check(gpu_.gather(&grow_, x, padded_, stream_));
        gpu_.check(
            gpu_.dipole_apply(&operator_, padded_, padded_, workspace_, workspace_bytes_, stream_));
        gpu_.check(gpu_.finish(&crop_, padded_, nullptr, padded_mask_, y, stream_));
    }

  private:
    const Gpu &gpu_;
    void *const stream_;
    DeviceMemory memory_;
    qsm_cuda_dipole operator_;
    qsm_cuda_patch grow_, crop_;
    size_t workspace_bytes_;
    float *padded_;
    uint8_t *padded_mask_;
    void *workspace_;
};

void closed_form(const Gpu &gpu, const Scan &scan, double lambda, float *chi, const float *field,
                 void *stream) {
    DeviceFilter filter(gpu, scan, stream);
    const DeviceSums sums(gpu, int64_t(scan.geometry.voxels()), stream);
    DeviceMemory memory(gpu);
    auto *image = memory.make<float>(scan.geometry.voxels());
    filter.apply(QSM_CUDA_TIKHONOV_PRIOR, lambda, chi, chi);
    filter.apply(QSM_CUDA_TIKHONOV, lambda, field, image);
    sums.combine(1, image, 1, chi);
    gpu.wait(stream);
}

// Volumes on the padded box of a mask, and the dipole operator there, enqueued on one stream.
class DeviceBox {
  public:
    DeviceBox(const Gpu &gpu, const Scan &scan, void *stream)
        : gpu_(gpu),
          stream_(stream),
          memory_(gpu),
          grid_(scan),
          operator_(operator_on(grid_.geometry)) {
        const Shape &n = grid_.geometry.shape;
        workspace_bytes_ = workspace_for(gpu, operator_);
        workspace_ = memory_.make<uint8_t>(workspace_bytes_);
        const std::vector<uint8_t> places = grid_.places(size_t(n[2]));
        for (const Place outermost : {kMeasured, kSupport}) {
            std::vector<uint8_t> inside(places.size());
            for (size_t i = 0; i < inside.size(); ++i) inside[i] = places[i] <= outermost;
            within_[outermost] = memory_.make<uint8_t>(inside.size());
            gpu_.upload(within_[outermost], inside.data(), inside.size(), stream_);
            gpu_.wait(stream_);
        }
    }

    size_t voxels() const { return grid_.geometry.voxels(); }
    void apply(const float *x, float *y) const {
        gpu_.check(gpu_.dipole_apply(&operator_, x, y, workspace_, workspace_bytes_, stream_));
    }

    // y = x, 0 beyond a place.
    void keep(Place outermost, const float *x, float *y) const {
        const qsm_cuda_patch all = box(grid_.geometry.shape, 0, grid_.geometry.shape);
        gpu_.check(gpu_.finish(&all, x, nullptr, within_[outermost], y, stream_));
    }

    // From the scan's grid to the padded one, and back.
    void load(const float *volume, float *x) const {
        const qsm_cuda_patch grown = box(grid_.scan.geometry.shape, -1, grid_.geometry.shape);
        gpu_.check(gpu_.gather(&grown, volume, x, stream_));
    }
    void store(const float *x, float *volume) const {
        const qsm_cuda_patch inner = box(grid_.geometry.shape, 1, grid_.scan.geometry.shape);
        gpu_.check(gpu_.gather(&inner, x, volume, stream_));
    }

  private:
    // `way` is that from the scan to the padded grid.
    qsm_cuda_patch box(const Shape &volume, int32_t way, const Shape &size) const {
        qsm_cuda_patch box{1, {}, {}, {}};
        for (size_t axis = 0; axis < 3; ++axis) {
            box.volume[axis] = volume[axis];
            box.start[axis] = way * (grid_.pads[axis] - grid_.box[axis].start);
            box.size[axis] = size[axis];
        }
        return box;
    }

    const Gpu &gpu_;
    void *const stream_;
    DeviceMemory memory_;
    const PaddedBox grid_;
    const qsm_cuda_dipole operator_;
    size_t workspace_bytes_;
    void *workspace_;
    uint8_t *within_[2];
};

void conjugate_gradients(const Gpu &gpu, const Scan &scan, const qsm_params &params, float *chi,
                         const float *field, void *stream, Caller &caller) {
    const double lambda = static_cast<float>(params.data_consistency_lambda);
    const DeviceBox box(gpu, scan, stream);
    const DeviceSums sums(gpu, int64_t(box.voxels()), stream);
    DeviceMemory memory(gpu);
    const auto make = [&] { return memory.make<float>(box.voxels()); };
    float *x = make(), *r = make(), *direction = make(), *image = make(), *between = make();
    const auto convolve = [&](const float *from, Place outermost, float *to) {
        box.apply(from, between);
        box.keep(outermost, between, to);
    };
    box.load(chi, x);
    box.load(field, between);
    box.keep(kMeasured, between, r);
    convolve(x, kMeasured, image);
    sums.combine(-1, image, 1, r);
    convolve(r, kSupport, r);
    box.keep(kSupport, r, direction);
    double squared = sums.dot(r, r);
    const double first = squared;
    for (int32_t n = 0; n < params.data_consistency_iterations && squared > kSolved * first; ++n) {
        caller.poll();
        convolve(direction, kMeasured, image);
        convolve(image, kSupport, image);
        box.keep(kMeasured, direction, between);
        sums.combine(lambda, between, 1, image);
        const double length = squared / sums.dot(direction, image);
        sums.combine(length, direction, 1, x);
        sums.combine(-length, image, 1, r);
        const double before = squared;
        squared = sums.dot(r, r);
        sums.combine(1, r, squared / before, direction);
        caller.done();
    }
    box.keep(kMeasured, x, between);
    box.store(between, chi);
    gpu.wait(stream);
}

}  // namespace

DeviceSums::DeviceSums(const Gpu &gpu, int64_t count, void *stream)
    : gpu_(gpu),
      count_(count),
      stream_(stream),
      memory_(gpu),
      workspace_(memory_.make<uint8_t>(QSM_CUDA_DOT_WORKSPACE)),
      result_(memory_.make<double>(1)) {}

double DeviceSums::dot(const float *x, const float *y) const {
    gpu_.check(gpu_.dot(count_, x, y, result_, workspace_, stream_));
    double sum = 0;
    gpu_.download(&sum, result_, sizeof sum, stream_);
    return sum;
}

void DeviceSums::combine(double a, const float *x, double b, float *y) const {
    gpu_.check(gpu_.combine(count_, {float(a), nullptr, nullptr}, x, {float(b), nullptr, nullptr},
                            y, stream_));
}

double correction_bytes(const Gpu &gpu, const Scan &scan, Correction correction) {
    const double volume = double(sizeof(float));
    if (correction == Correction::kClosedForm) {
        return DeviceFilter::bytes(gpu, scan.geometry) +
               volume * double(scan.geometry.voxels());
    }
    const Geometry grid = PaddedBox(scan).geometry;
    return (5 * volume + 2) * double(grid.voxels()) +
           double(workspace_for(gpu, operator_on(grid)));
}

void make_consistent_on_device(const Gpu &gpu, const Scan &scan, const qsm_params &params,
                               float *chi, const float *field, void *stream, Caller &caller) {
    if (params.data_consistency_iterations) {
        conjugate_gradients(gpu, scan, params, chi, field, stream, caller);
        return;
    }
    caller.poll();
    closed_form(gpu, scan, params.data_consistency_lambda, chi, field, stream);
}

}  // namespace qsm::host
