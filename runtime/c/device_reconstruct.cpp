// The reconstruction on a GPU: one stream, one patch at a time. Compiled, never run on a GPU.
#include <array>
#include <cmath>
#include <limits>

#include "device_filter.h"
#include "error.h"
#include "gpu.h"
#include "network_inputs.h"
#include "planning.h"
#include "prior_maps.h"
#include "reconstruct.h"
#include "request.h"

namespace qsm::host {

namespace {

constexpr double kShareOfFree = 0.95;  // the rest is for what the libraries take for themselves
constexpr double kFloat = sizeof(float);

// One reconstruction: what it is of, and what it has on the GPU.
class DeviceRun {
  public:
    DeviceRun(DeviceSession &session, const Scan &scan, const qsm_params &params, void *stream)
        : gpu_(Gpu::get()),
          session_(session),
          scan_(scan),
          params_(params),
          stream_(stream),
          memory_(gpu_) {}

    Decision decide() const {
        const auto stages = [this](const PatchPlan &plan) { return stages_of(plan); };
        const double limit = params_.memory_limit_bytes ? double(params_.memory_limit_bytes)
                                                        : kShareOfFree * double(gpu_.free_bytes());
        return host::decide({session_.card(), scan_, stages}, params_, limit);
    }

    // Leaves the masked map at chi, and waits.
    void run(const PatchPlan &plan, int threads, float *chi, Caller &caller) {
        const size_t voxels = scan_.geometry.voxels();
        field_ = send(scan_.local_field_ppm);
        inside_ = send(scan_.mask);
        const Card &card = session_.card();
        const std::vector<Volume> inputs = network_inputs(card, scan_, threads, caller);
        for (const Volume &input : inputs) {
            inputs_.push_back(input.empty() ? field_ : send(input));
        }
        infer(plan, chi, caller);
        if (const auto &anchor = card.anchor) {
            Volume here(voxels);
            gpu_.download(here.data(), chi, voxels * sizeof(float), stream_);
            const Volume &prior = inputs[input_index(card, anchor->prior)];
            anchor_map(here, prior, anchor->threshold, scan_, threads);
            gpu_.upload(chi, here.data(), voxels * sizeof(float), stream_);
            gpu_.wait(stream_);
        }
        if (correction_from(params_) != Correction::kNone) {
            make_consistent_on_device(gpu_, scan_, params_, chi, field_, stream_, caller);
        }
        const DeviceSums sums(gpu_, int64_t(voxels), stream_);
        if (!std::isfinite(sums.dot(chi, chi))) throw not_finite();
    }

  private:
    template <class T>
    T *send(const std::vector<T> &values) {
        T *there = memory_.make<T>(values.size());
        gpu_.upload(there, values.data(), values.size() * sizeof(T), stream_);
        gpu_.wait(stream_);
        return there;
    }

    // The engine's view of the inputs; without memory for patches where only shapes are asked for.
    std::vector<Tensor> tensors(const Shape &size, DeviceMemory *memory) const {
        std::vector<Tensor> made;
        for (const TensorInfo &tensor : session_.card().inputs) {
            made.push_back({tensor.name, input_shape(tensor.name, size), nullptr});
            if (!memory) continue;
            const size_t n = made.size() - 1;
            made[n].data =
                made[n].is_volume() ? memory->make<float>(Geometry::voxels_of(size)) : inputs_[n];
        }
        return made;
    }

    // Pointers to the windows of the three axes, (patches, size) each.
    std::array<const float *, 3> send_windows(const PatchPlan &plan) {
        std::array<const float *, 3> windows{};
        for (size_t axis = 0; axis < 3; ++axis) {
            Volume joined;
            for (const auto &window : plan.axes[axis].windows) {
                joined.insert(joined.end(), window.begin(), window.end());
            }
            windows[axis] = send(joined);
        }
        return windows;
    }

    void gather(const Patch &patch, const std::vector<Tensor> &patches) const {
        for (size_t n = 0; n < inputs_.size(); ++n) {
            if (!patches[n].is_volume()) continue;
            gpu_.check(gpu_.gather(&patch.box, inputs_[n], const_cast<float *>(patches[n].data),
                                   stream_));
        }
    }

    void infer(const PatchPlan &plan, float *chi, Caller &caller) {
        const Shape size = plan.patch_shape();
        DeviceMemory memory(gpu_);
        auto *total = memory.make<float>(scan_.geometry.voxels());
        auto *output = memory.make<float>(Geometry::voxels_of(size));
        const std::vector<Tensor> patches = tensors(size, &memory);
        const auto scratch_bytes = session_.scratch_bytes(patches);
        if (!scratch_bytes) throw Error(QSM_ENGINE_ERROR, "the engine does not serve this patch");
        auto *scratch = memory.make<uint8_t>(*scratch_bytes);
        const std::array<const float *, 3> windows = send_windows(plan);
        gpu_.zero(total, scan_.geometry.voxels() * sizeof(float), stream_);
        for (int64_t index = 0; index < plan.count(); ++index) {
            caller.poll();
            const Patch patch = plan.patch(index);
            if (touches(patch.box, scan_.mask)) {
                gather(patch, patches);
                session_.enqueue(patches, output, scratch, stream_);
                const float *at[3];
                for (size_t axis = 0; axis < 3; ++axis) {
                    at[axis] = windows[axis] + size_t(patch.at[axis]) * size_t(size[axis]);
                }
                gpu_.check(gpu_.accumulate(&patch.box, output, at[0], at[1], at[2], total, nullptr,
                                           stream_));
                gpu_.wait(stream_);
            }
            caller.done();
        }
        const Shape &n = scan_.geometry.shape;
        const qsm_cuda_patch whole{1, {n[0], n[1], n[2]}, {0, 0, 0}, {n[0], n[1], n[2]}};
        gpu_.check(gpu_.finish(&whole, total, nullptr, inside_, chi, stream_));
        gpu_.wait(stream_);
    }

    std::vector<StageMemory> stages_of(const PatchPlan &plan) const {
        const Card &card = session_.card();
        const double voxels = double(scan_.geometry.voxels());
        const double patch = double(Geometry::voxels_of(plan.patch_shape()));
        double volumes = 0;
        for (const TensorInfo &tensor : card.inputs) volumes += tensor.is_volume() ? 1 : 0;
        volumes += field_sign(card) != 1;                           // the field itself
        const double held = voxels * (kFloat * (volumes + 1) + 1);  // and the map, and the mask
        std::vector<StageMemory> stages;
        const auto scratch = session_.scratch_bytes(tensors(plan.patch_shape(), nullptr));
        const double engine = scratch ? double(*scratch) : std::numeric_limits<double>::infinity();
        stages.push_back({"inference", held + kFloat * (voxels + patch * (volumes + 1)) + engine});
        const Correction correction = correction_from(params_);
        if (correction != Correction::kNone) {
            stages.push_back(
                {"data consistency", held + correction_bytes(gpu_, scan_, correction)});
        }
        return stages;
    }

    const Gpu &gpu_;
    DeviceSession &session_;
    const Scan &scan_;
    const qsm_params &params_;
    void *const stream_;
    DeviceMemory memory_;
    std::vector<const float *> inputs_;  // on the GPU, in the order of the card's
    const float *field_ = nullptr;
    const uint8_t *inside_ = nullptr;
};

}  // namespace

Volume reconstruct_on_device(DeviceSession &session, Scan &scan, const qsm_params &params,
                             int threads, float *chi_ppm, void *stream) {
    Caller caller(params);
    prepare(scan, session.card(), params, caller);
    DeviceRun run(session, scan, params, stream);
    const Decision decision = run.decide();
    caller.begin(decision, variation_steps(session.card()) + decision.plan.count());
    Volume chi;
    if (chi_ppm) {
        run.run(decision.plan, threads, chi_ppm, caller);
    } else {
        const Gpu &gpu = Gpu::get();
        DeviceMemory memory(gpu);
        chi.resize(scan.geometry.voxels());
        auto *there = memory.make<float>(chi.size());
        run.run(decision.plan, threads, there, caller);
        gpu.download(chi.data(), there, chi.size() * sizeof(float), stream);
    }
    caller.end();
    return chi;
}

Scan scan_from_device(const qsm_scan &given, const Layout &layout, FieldKind kind, void *stream) {
    const size_t voxels = geometry_from(given, layout.axes).voxels();  // checked before anything is copied
    const Gpu &gpu = Gpu::get();
    Volume field(voxels);
    std::vector<uint8_t> mask(voxels);
    gpu.download(field.data(), given.local_field_ppm, voxels * sizeof(float), stream);
    gpu.download(mask.data(), given.mask, voxels, stream);
    qsm_scan here = given;
    here.local_field_ppm = field.data();
    here.mask = mask.data();
    return scan_from(here, layout, kind);
}

}  // namespace qsm::host
