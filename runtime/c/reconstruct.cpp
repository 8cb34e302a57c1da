#include "reconstruct.h"

#include <cmath>

#include "data_consistency.h"
#include "error.h"
#include "launch.h"
#include "memory.h"
#include "network_inputs.h"
#include "planning.h"
#include "prior_maps.h"
#include "request.h"

namespace qsm::host {

namespace {

// Runs the network over all patches that touch the mask, and adds them up.
Volume run_patches(Session &session, const Scan &scan, const PatchPlan &plan,
                   const std::vector<Volume> &inputs, Caller &caller) {
    const Shape size = plan.patch_shape();
    std::vector<Volume> patches(inputs.size());
    std::vector<Tensor> tensors;
    for (size_t n = 0; n < inputs.size(); ++n) {
        const std::string &name = session.card().inputs[n].name;
        tensors.push_back({name, input_shape(name, size), inputs[n].data()});
        if (!tensors[n].is_volume()) continue;
        patches[n].resize(Geometry::voxels_of(size));
        tensors[n].data = patches[n].data();
    }
    Volume total(scan.geometry.voxels());
    const int32_t rows = size[0] * size[1];
    for (int64_t index = 0; index < plan.count(); ++index) {
        caller.poll();
        const Patch patch = plan.patch(index);
        if (touches(patch.box, scan.mask)) {
            for (size_t n = 0; n < inputs.size(); ++n) {
                if (!tensors[n].is_volume()) continue;
                const Volume &from = inputs[n].empty() ? scan.local_field_ppm : inputs[n];
                launch(Gather{patch.box, from.data(), patches[n].data()}, rows, nullptr);
            }
            const float *output = session.run(tensors, [&] { caller.poll(); });
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
    const HostMemory memory{card, scan, session.backend(), correction_from(params),
                            prior_bytes(card.priors, scan)};
    const auto stages = [&](const PatchPlan &plan) { return memory.stages(plan); };
    const Decision decision = decide({card, scan, stages}, params, limit_bytes(params));
    caller.begin(decision, variation_steps(card) + decision.plan.count());
    Volume chi;
    {
        const std::vector<Volume> inputs = network_inputs(card, scan, threads, caller);
        chi = run_patches(session, scan, decision.plan, inputs, caller);
        mask_finite(chi, scan.mask, "the network");
        if (const auto &anchor = card.anchor) {
            const Volume &prior = inputs[input_index(card, anchor->prior)];
            anchor_map(chi, prior, anchor->threshold, scan, threads);
        }
    }
    if (correction_from(params) != Correction::kNone) {
        make_consistent(chi, scan, params.data_consistency_lambda,
                        params.data_consistency_iterations, threads, caller);
    }
    caller.end();
    return chi;
}

}  // namespace qsm::host
