#include "reconstruct.h"

#include <cmath>

#include "data_consistency.h"
#include "dipole_filter.h"
#include "error.h"
#include "launch.h"
#include "memory.h"
#include "planning.h"
#include "request.h"

namespace qsm::host {

namespace {

// What a network takes: volumes of the scan's grid, and numbers.
struct Input {
    std::string name;
    Volume values;
    bool is_volume;
    std::vector<size_t> shape;  // of numbers
};

// The TKD map is made of the whole volume, so that patches of it equal the whole.
Volume tkd_map(const TkdSettings &tkd, const Scan &scan, int threads) {
    DipoleFilter filter(scan.geometry, int32_t(tkd.pad_voxels), threads);
    Volume chi = filter.apply(scan.local_field_ppm, filter.multiplier(tkd_response(tkd.threshold)));
    if (tkd.masked) {
        for (size_t n = 0; n < chi.size(); ++n) chi[n] *= float(scan.mask[n]);
    }
    return chi;
}

Input input_from(const std::string &name, const Card &card, const Scan &scan, int threads) {
    const auto three = [](const double (&v)[3]) {
        return Volume{float(v[0]), float(v[1]), float(v[2])};
    };
    if (name == "tkd_chi_ppm") return {name, tkd_map(*card.tkd, scan, threads), true, {}};
    if (name == "mask") return {name, Volume(scan.mask.begin(), scan.mask.end()), true, {}};
    if (name == "voxel_size_mm") return {name, three(scan.geometry.voxel_size_mm), false, {3}};
    if (name == "b0_direction") return {name, three(scan.geometry.b0_direction), false, {1, 3}};
    return {name, {}, true, {}};  // the field, which the scan holds
}

// Runs the network over all patches that touch the mask, and adds them up.
Volume run_patches(Session &session, const Scan &scan, const PatchPlan &plan,
                   const std::vector<Input> &inputs, Caller &caller) {
    const Shape size = plan.patch_shape();
    std::vector<Volume> patches(inputs.size());
    std::vector<Tensor> tensors;
    for (size_t n = 0; n < inputs.size(); ++n) {
        const Input &input = inputs[n];
        if (!input.is_volume) {
            tensors.push_back({input.name, input.shape, input.values.data()});
            continue;
        }
        patches[n].resize(Geometry::voxels_of(size));
        tensors.push_back({input.name,
                           {1, 1, size_t(size[0]), size_t(size[1]), size_t(size[2])},
                           patches[n].data()});
    }
    Volume total(scan.geometry.voxels());
    const int32_t rows = size[0] * size[1];
    for (int64_t index = 0; index < plan.count(); ++index) {
        caller.poll();
        const Patch patch = plan.patch(index);
        if (touches(patch.box, scan.mask)) {
            for (size_t n = 0; n < inputs.size(); ++n) {
                if (!inputs[n].is_volume) continue;
                const Volume &from =
                    inputs[n].values.empty() ? scan.local_field_ppm : inputs[n].values;
                launch(Gather{patch.box, from.data(), patches[n].data()}, rows, nullptr);
            }
            const float *output = session.run(tensors);
            launch(Accumulate{patch.box, output, patch.windows[0], patch.windows[1],
                              patch.windows[2], total.data(), nullptr},
                   rows, nullptr);
        }
        caller.done();
    }
    return total;
}

}  // namespace

// Multiplied, not replaced: what is not finite must be seen, outside the mask too.
void mask_finite(Volume &chi, const std::vector<uint8_t> &mask, const char *whose) {
    size_t bad = 0;
    for (size_t n = 0; n < chi.size(); ++n) {
        chi[n] *= float(mask[n]);
        bad += !std::isfinite(chi[n]);
    }
    if (!bad) return;
    throw not_finite(bad, whose);
}

Volume reconstruct(Session &session, Scan &scan, const qsm_params &params, int threads) {
    const Card &card = session.card();
    Caller caller(params);
    prepare(scan, card, params, caller);
    const HostMemory memory{card, scan, session.backend(), correction_from(params)};
    const auto stages = [&](const PatchPlan &plan) { return memory.stages(plan); };
    const Decision decision = decide({card, scan, stages}, params, limit_bytes(params));
    caller.begin(decision);
    Volume chi;
    {
        std::vector<Input> inputs;
        for (const TensorInfo &tensor : card.inputs) {
            inputs.push_back(input_from(tensor.name, card, scan, threads));
        }
        chi = run_patches(session, scan, decision.plan, inputs, caller);
    }
    mask_finite(chi, scan.mask, "the network");
    if (correction_from(params) != Correction::kNone) {
        make_consistent(chi, scan, params.data_consistency_lambda,
                        params.data_consistency_iterations, threads, caller);
    }
    caller.end();
    return chi;
}

}  // namespace qsm::host
