#include "memory.h"

#include <algorithm>
#include <fstream>
#include <limits>

#include "data_consistency.h"
#include "network_inputs.h"
#include "total_variation.h"

namespace qsm::host {

namespace {

constexpr double kFloat = sizeof(float);
constexpr double kFixedBytes = 1e6;          // of the transform and its threads, as measured
constexpr double kTransform = 6.2;           // per padded voxel: a volume and half a multiplier
constexpr double kIteratedTkd = 8;          // per padded voxel: a volume, half of D and of TKD's
constexpr double kClosedForm = 8;           // per voxel: the other term
constexpr double kConjugateGradients = 19;  // per voxel of a padded box: four volumes, half of D
constexpr double kShareOfAvailable = 0.8;

// With the transform's room between rows.
double stored_voxels(const Geometry &padded) {
    const Shape &n = padded.shape;
    return double(n[0]) * n[1] * 2 * (n[2] / 2 + 1);
}

MemoryUse inference_memory(const Card &card, const std::string &backend) {
    const auto measured = card.memory.find(backend);
    if (measured != card.memory.end()) return measured->second;
    return std::max_element(card.memory.begin(), card.memory.end(),
                            [](const auto &a, const auto &b) {
                                return a.second.bytes_per_voxel < b.second.bytes_per_voxel;
                            })
        ->second;
}

}  // namespace

std::vector<StageMemory> HostMemory::stages(const PatchPlan &plan) const {
    const Geometry &geometry = scan.geometry;
    const double voxels = double(geometry.voxels());
    const double patch = double(Geometry::voxels_of(plan.patch_shape()));
    const MemoryUse use = inference_memory(card, backend);
    const double session = double(use.fixed_bytes) + double(use.bytes_per_voxel) * patch;
    double held = double(kScanBytes) * voxels;
    double inputs = 0;
    for (const TensorInfo &tensor : card.inputs) {
        if (tensor.is_volume()) inputs += double(tensor.shape[1].number);
    }
    if (field_sign(card) != 1) held += kFloat * voxels;  // the field, as the network takes it
    std::vector<StageMemory> stages;
    if (prepare_bytes > 0) stages.push_back({"prepare", held + prepare_bytes});
    stages.push_back({"inference", held + kFloat * (voxels + patch) * inputs + session});
    if (card.anchor) {
        const double step = kIteratedTkd * stored_voxels(PaddedBox(scan).geometry);
        stages.push_back({"anchor", held + kFloat * voxels * inputs + session + kFixedBytes + step});
    }
    if (correction != Correction::kNone) {
        const double step =
            correction == Correction::kClosedForm
                ? kClosedForm * voxels +
                      kTransform * double(geometry.padded(kCorrectionPadVoxels).voxels())
                : kConjugateGradients * stored_voxels(PaddedBox(scan).geometry);
        held += kFloat * voxels + session;  // the map; an engine keeps the memory it once needed
        stages.push_back({"data consistency", held + kFixedBytes + step});
    }
    return stages;
}

double prior_bytes(const std::vector<PriorMap> &priors, const Scan &scan) {
    if (priors.empty()) return 0;
    const double volume = kFloat * double(scan.geometry.voxels());
    const double padded = stored_voxels(PaddedBox(scan).geometry);
    double made = 0, most = 0;
    for (const PriorMap &prior : priors) {
        made += volume;
        const double work = prior.is_tkd() ? kIteratedTkd * padded + volume : kTvBytes * padded;
        most = std::max(most, made + work);
    }
    return kFixedBytes + most;
}

double tv_bytes(const Geometry &geometry, const Geometry &padded) {
    return kFixedBytes + (kScanBytes + kFloat) * double(geometry.voxels()) +
           kTvBytes * stored_voxels(padded);
}

double tkd_bytes(const Geometry &geometry, const Geometry &padded) {
    return kFixedBytes + (kScanBytes + kFloat) * double(geometry.voxels()) +
           kTransform * double(padded.voxels());
}

double limit_bytes(const qsm_params &params) {
    if (params.memory_limit_bytes) return double(params.memory_limit_bytes);
    double available = std::numeric_limits<double>::infinity();
    std::ifstream memory("/proc/meminfo");
    for (std::string name; memory >> name; memory.ignore(1000, '\n')) {
        double kib = 0;
        if (name == "MemAvailable:" && memory >> kib) available = kib * 1024;
    }
    double limit = 0, current = 0;
    std::ifstream most("/sys/fs/cgroup/memory.max"), now("/sys/fs/cgroup/memory.current");
    if (most >> limit && now >> current) available = std::min(available, limit - current);
    return kShareOfAvailable * available;
}

}  // namespace qsm::host
