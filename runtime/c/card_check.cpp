// What the fields of a card must say together, and what of that this library runs.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "axes.h"
#include "card.h"
#include "error.h"

namespace qsm::host {

namespace {

// What a graph may take and give besides prior maps, and its unit.
const std::map<std::string, std::string> kUnits = {
    {"local_field_ppm", "ppm"},  {"total_field_ppm", "ppm"},
    {"phase_rad", "rad"},        {"r2prime_hz", "Hz"},
    {"mask", "1"},               {"field_noise_ppm", "ppm"},
    {"voxel_size_mm", "mm"},     {"b0_direction", "1"},
    {"echo_time_s", "s"},        {"field_strength_t", "T"},
    {"prior_input", "1"},        {"rough_chi_ppm", "ppm"},
    {"prior_output", "1"},       {"chi_ppm", "ppm"},
    {"chi_positive_ppm", "ppm"}, {"chi_negative_ppm", "ppm"}};

// What a network of one graph takes first, takes besides, and gives.
struct Task {
    std::string first;
    std::vector<std::string> besides, given;
};

const std::map<std::string, Task> kTasks = {
    {"local_field->chi", {"local_field_ppm", {}, {"chi_ppm"}}},
    {"total_field->chi", {"total_field_ppm", {}, {"chi_ppm"}}},
    {"phase->chi", {"phase_rad", {}, {"chi_ppm"}}},
    {"total_field->local_field", {"total_field_ppm", {}, {"local_field_ppm"}}},
    {"phase->local_field", {"phase_rad", {}, {"local_field_ppm"}}},
    {"local_field+chi+r2prime->chi_positive+chi_negative",
     {"local_field_ppm", {"chi_ppm", "r2prime_hz"}, {"chi_positive_ppm", "chi_negative_ppm"}}}};

// Volumes besides the first input that are no prior maps, in the order in which tasks have them.
const std::vector<std::string> kMapsTaken = {"chi_ppm", "r2prime_hz"};

const std::string kChiOfField = "local_field->chi";  // all that pipelines other than cnn are for
const std::string kField = "local_field_ppm";
constexpr int64_t kMostSteps = 1000;  // of a prior map
constexpr int64_t kMostTile = 4096;   // voxels a side

const std::map<std::string, std::vector<std::string>> kFirstInputs = {
    {"cnn", {"local_field_ppm", "total_field_ppm", "phase_rad"}},
    {"lpcnn", {"prior_input"}},
    {"modl", {"prior_input"}},
    {"spinet", {"prior_input"}},
    {"nextqsm", {"prior_input"}},
    {"after", {"local_field_ppm", "rough_chi_ppm"}}};

struct Range {
    const char *path;
    std::optional<double> value;
    double least, most;
};

// As RANGES in runtime/card/card.py; sums and products of such sizes fit 64 bits.
std::vector<Range> ranges(const Card &card) {
    constexpr double kMostVoxels = 4096, kMostRounds = 1000, kLargest = FLT_MAX;
    const ReceptiveField &field = card.receptive_field;
    const GeometryLimits &limits = card.geometry;
    const auto constant = [&](const char *name) {
        const auto found = card.constants.find(name);
        return found == card.constants.end() ? std::nullopt : std::optional<double>(found->second);
    };
    return {{"divisor", double(card.divisor), 1, kMostVoxels},
            {"receptive_field.halo", field.halo, 0, kMostVoxels},
            {"receptive_field.theoretical", field.theoretical, 0, kMostVoxels},
            {"receptive_field.energy_kept", field.energy_kept, 0, 1},
            {"geometry.voxel_tolerance", limits.voxel_tolerance, 0, kLargest},
            {"geometry.b0_tolerance_deg", limits.b0_tolerance_deg, 0, kLargest},
            {"constants.mask_erosion_voxels", constant("mask_erosion_voxels"), 0, kMostVoxels},
            {"constants.iterations", constant("iterations"), 1, kMostRounds},
            {"constants.cg_steps", constant("cg_steps"), 1, kMostRounds}};
}

// What the loops around the unrolled ones compute with.
const std::map<std::string, std::vector<const char *>> kLoops = {
    {"lpcnn", {"alpha", "iterations", "chi_mean", "chi_std"}},
    {"modl", {"step", "iterations", "chi_mean", "chi_std", "field_mean", "field_std"}},
    {"spinet", {"lambda", "p", "iterations", "cg_steps", "chi_mean", "chi_std"}},
    {"nextqsm", {"iterations", "lambda_1"}}};

bool contains(const std::vector<std::string> &all, const std::string &one) {
    return std::find(all.begin(), all.end(), one) != all.end();
}

std::vector<std::string> names_of(const std::vector<TensorInfo> &tensors) {
    std::vector<std::string> names;
    for (const TensorInfo &tensor : tensors) names.push_back(tensor.name);
    return names;
}

std::string joined(const std::vector<std::string> &names) {
    std::string all;
    for (const std::string &name : names) all += (all.empty() ? "" : ", ") + name;
    return all;
}

bool is_prior(const Card &card, const std::string &name) {
    return std::any_of(card.priors.begin(), card.priors.end(),
                       [&](const PriorMap &prior) { return prior.name == name; });
}

// In the order in which they are made.
std::string prior_contradiction(const Card &card) {
    const std::vector<std::string> names = names_of(card.inputs);
    const bool needs_one_field = !card.priors.empty() || contains(names, "field_noise_ppm");
    const bool is_one = names[0] == kField && card.inputs[0].is_volume() &&
                        card.inputs[0].shape[1].number == 1;
    if (needs_one_field && (card.pipeline != "cnn" || !is_one)) {
        return "what is made of a " + kField + " needs pipeline cnn, and one as the first input";
    }
    std::vector<std::string> taken = names, seen, fields = {kField};
    for (const PriorMap &prior : card.priors) taken.push_back(prior.of);
    for (const PriorMap &prior : card.priors) {
        if (kUnits.count(prior.name) || contains(seen, prior.name)) {
            return "the prior map " + prior.name + " has a name that is taken";
        }
        if (!contains(taken, prior.name)) return "nothing takes the prior map " + prior.name;
        if (prior.is_tkd() ? !contains(fields, prior.of) : prior.of != kField) {
            return "the prior map " + prior.name + ", " + prior.method + ", is of " + prior.of;
        }
        if (prior.steps < 1 || prior.steps > kMostSteps) {
            return prior.name + " takes " + std::to_string(prior.steps) + " steps, expected 1 to " +
                   std::to_string(kMostSteps);
        }
        if (prior.threshold.has_value() != prior.is_tkd()) {
            return prior.name + ", " + prior.method + ", has " +
                   (prior.threshold ? "a" : "no") + " threshold";
        }
        if (prior.threshold && !(*prior.threshold > 0 && *prior.threshold <= 2.0 / 3)) {
            return prior.name +
                   text(" has the threshold %g, expected in (0, 2/3]", *prior.threshold);
        }
        seen.push_back(prior.name);
        if (prior.method == "tv_field" || prior.method == "tv_residual") {
            fields.push_back(prior.name);
        }
    }
    if (!card.anchor) return "";
    const Anchor &anchor = *card.anchor;
    if (contains(fields, anchor.prior) || !contains(seen, anchor.prior) ||
        !contains(names, anchor.prior)) {
        return "the anchor " + anchor.prior + " is no prior map that the network takes";
    }
    if (!(anchor.threshold > 0 && anchor.threshold <= 2.0 / 3)) {
        return text("the anchor has the threshold %g, expected in (0, 2/3]", anchor.threshold);
    }
    return "";
}

std::string tensor_contradiction(const Card &card, const TensorInfo &tensor) {
    const bool of_prior = is_prior(card, tensor.name);
    const auto known = kUnits.find(tensor.name);
    if (known == kUnits.end() && !of_prior) return "an unknown tensor " + tensor.name;
    const std::string unit = of_prior ? "ppm" : known->second;
    if (unit != tensor.unit) return tensor.name + " in " + tensor.unit + ", expected " + unit;
    if (of_prior && !(tensor.is_volume() && tensor.shape[1].number == 1)) {
        return "the prior map " + tensor.name + " is no volume of one channel";
    }
    if (!tensor.is_volume()) return "";
    const char *letters[] = {"n", "", "x", "y", "z"};
    for (const int axis : {0, 2, 3, 4}) {
        if (tensor.shape[static_cast<size_t>(axis)].letter == letters[axis]) continue;
        return tensor.name + " must have the shape (n, c, x, y, z)";
    }
    return tensor.shape[1].number < 1 ? tensor.name + " has no channels" : "";
}

std::string geometry_contradiction(const GeometryLimits &limits) {
    if (limits.voxel_size_mm.has_value() != limits.voxel_tolerance.has_value()) {
        return "one of geometry.voxel_size_mm and voxel_tolerance is null, expected both or none";
    }
    if (limits.b0_direction.has_value() != limits.b0_tolerance_deg.has_value()) {
        return "one of geometry.b0_direction and b0_tolerance_deg is null, expected both or none";
    }
    if (limits.voxel_size_mm) {
        const auto &mm = *limits.voxel_size_mm;
        if (*std::min_element(mm.begin(), mm.end()) <= 0) {
            return "geometry.voxel_size_mm is not positive";
        }
    }
    if (limits.b0_direction) {
        const auto &b = *limits.b0_direction;
        if (std::all_of(b.begin(), b.end(), [](double v) { return v == 0; })) {
            return "geometry.b0_direction is zero";
        }
    }
    return "";
}

std::string axes_contradiction(const std::string &letters) {
    try {
        axes_named(letters);
        return "";
    } catch (const Error &error) {
        return error.what();
    }
}

std::string number_contradiction(const Card &card) {
    for (const Range &range : ranges(card)) {
        if (!range.value || (range.least <= *range.value && *range.value <= range.most)) continue;
        return text("%s is %g, expected %g to %g", range.path, *range.value, range.least, range.most);
    }
    for (const auto &[backend, use] : card.memory) {
        if (use.fixed_bytes < 0 || use.bytes_per_voxel < 1) {
            return "memory." + backend + " too small";
        }
    }
    std::vector<const char *> needed;
    if (const auto loop = kLoops.find(card.pipeline); loop != kLoops.end()) needed = loop->second;
    for (const char *name : needed) {
        if (card.constants.count(name) || card.normalisation.count(name)) continue;
        return "pipeline " + card.pipeline + " has no " + name;
    }
    return "";
}

// Along which axis they do not cover a volume.
std::string tiles_contradiction(const Tiles &tiles) {
    for (size_t axis = 0; axis < 3; ++axis) {
        const int64_t size = tiles.size[axis], kept = tiles.kept[axis];
        const int64_t stride = tiles.stride[axis], shared = kept - stride;
        const bool inside = stride >= 1 && 1 <= kept && kept <= size && size <= kMostTile &&
                            (size - kept) % 2 == 0;
        const bool fits = tiles.blend == "none"   ? shared == 0
                          : tiles.blend == "mean" ? size == kept && shared >= 0
                                                  : 2 <= shared && 2 * shared <= kept;
        if (inside && fits) continue;
        return text("tiles of %lld voxels, %lld kept every %lld, blend ",
                    static_cast<long long>(size), static_cast<long long>(kept),
                    static_cast<long long>(stride)) +
               tiles.blend + ": they do not cover a volume so";
    }
    return "";
}

std::string task_contradiction(const Card &card, const std::vector<std::string> &names) {
    const Task &task = kTasks.at(card.task);
    const std::vector<std::string> gives = names_of(card.outputs());
    if (card.pipeline != "cnn") {
        if (!card.further_outputs.empty()) {
            return "pipeline " + card.pipeline + " gives one output, not " + joined(gives);
        }
        if (card.task != kChiOfField) {
            return "pipeline " + card.pipeline + " is for " + kChiOfField + ", not " + card.task;
        }
    } else if (names[0] != task.first || gives != task.given) {
        return card.task + " takes " + task.first + " first and gives " + joined(task.given) +
               ", not " + names[0] + " and " + joined(gives);
    } else {
        std::vector<std::string> maps;
        for (const std::string &map : kMapsTaken) {
            if (std::count(names.begin() + 1, names.end(), map)) maps.push_back(map);
        }
        if (maps != task.besides) {
            return card.task + " takes " +
                   (task.besides.empty() ? "no map" : joined(task.besides)) + " besides, not " +
                   joined({names.begin() + 1, names.end()});
        }
    }
    if (!card.tiles) return "";
    if (card.pipeline != "cnn" || card.patchable != "no" || !card.priors.empty()) {
        return "tiles are for one graph that runs on nothing else, without prior maps";
    }
    const std::string found = tiles_contradiction(*card.tiles);
    if (!found.empty()) return found;
    for (const int64_t size : card.tiles->size) {
        if (size % std::max<int64_t>(1, card.divisor) == 0) continue;
        return "tiles of " + std::to_string(size) + " voxels are no multiples of " +
               std::to_string(card.divisor);
    }
    return "";
}

std::string pipeline_contradiction(const Card &card) {
    const std::vector<std::string> names = names_of(card.inputs);
    const auto &first = kFirstInputs.at(card.pipeline);
    if (names.empty() || !contains(first, names[0])) {
        return "pipeline " + card.pipeline + " takes another first input than " +
               (names.empty() ? "none" : names[0]);
    }
    std::vector<std::string> sorted = names;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return "an input twice";
    const bool unrolled = kLoops.count(card.pipeline) == 1;
    if (card.patchable != "no" && (card.patchable == "split") != unrolled) {
        return "pipeline " + card.pipeline + " is patchable: " + card.patchable;
    }
    const std::string found = task_contradiction(card, names);
    if (!found.empty()) return found;
    if (card.why_whole.has_value() != (card.patchable == "no")) {
        return "patchable is " + card.patchable + ", why_whole does not go with it";
    }
    const bool endless = !card.receptive_field.halo || !card.receptive_field.theoretical;
    if (card.patchable != "no" && endless) {
        return "patchable is " + card.patchable + ", but the receptive field has no end";
    }
    if (!card.inputs[0].is_volume()) return names[0] + ", the first input, is no volume";
    for (const TensorInfo &output : card.outputs()) {
        if (!output.is_volume()) return output.name + ", the output, is no volume";
    }
    return "";
}

}  // namespace

std::vector<std::string> task_names() {
    std::vector<std::string> names;
    for (const auto &[name, task] : kTasks) names.push_back(name);
    return names;
}

std::vector<TensorInfo> Card::outputs() const {
    std::vector<TensorInfo> all = {output};
    all.insert(all.end(), further_outputs.begin(), further_outputs.end());
    return all;
}

std::string contradictions(const Card &card) {
    std::string found = pipeline_contradiction(card);
    if (found.empty()) found = prior_contradiction(card);
    for (const TensorInfo &tensor : card.inputs) {
        if (found.empty()) found = tensor_contradiction(card, tensor);
    }
    for (const TensorInfo &tensor : card.outputs()) {
        if (found.empty()) found = tensor_contradiction(card, tensor);
    }
    if (found.empty()) found = geometry_contradiction(card.geometry);
    if (found.empty()) found = axes_contradiction(card.axes);
    return found.empty() ? number_contradiction(card) : found;
}

void require_supported(const Card &card) {
    const auto refuse = [&](const std::string &why) {
        throw Error(QSM_ENGINE_ERROR, card.network + " " + why);
    };
    const std::string python = "; use the Python runtime, qsm-run";
    if (card.pipeline != "cnn") {
        const bool has_forms = kLoops.count(card.pipeline) && card.pipeline != "nextqsm";
        refuse("is the CNN of pipeline " + card.pipeline +
               ", whose other steps this library does not know" + python +
               (has_forms ? ", or export it as one graph (qsm-export --list says which option)"
                          : ""));
    }
    if (card.inputs[0].name == "phase_rad") {
        refuse("takes a phase, this library takes fields" + python);
    }
    if (card.inputs[0].shape[1].number != 1) {
        refuse("takes several fields, this library takes one" + python);
    }
    if (!card.further_outputs.empty()) {
        refuse("gives " + joined(names_of(card.outputs())) + ", this library gives one map" +
               python);
    }
    const auto unmasked = card.constants.find("unmasked");
    if (unmasked != card.constants.end() && unmasked->second != 0) {
        refuse("takes the field outside the mask too, which this library does not read" + python);
    }
    if (card.tiles && (card.tiles->beyond != "zero" || card.tiles->blend == "ramp")) {
        refuse("runs in tiles that lie beyond the volume as its edge, or fade (blend ramp), which "
               "this library does not do" +
               python);
    }
    const std::vector<std::string> known = {kField,          "total_field_ppm", "mask",
                                            "field_noise_ppm", "voxel_size_mm", "b0_direction"};
    for (const TensorInfo &tensor : card.inputs) {
        if (!contains(known, tensor.name) && !is_prior(card, tensor.name)) {
            refuse("takes " + tensor.name + ", which this library cannot give" + python);
        }
    }
    if (card.output.shape[1].number != 1) {
        refuse("gives " + card.output.name + " of " + std::to_string(card.output.shape[1].number) +
               " channels, expected one; export it again");
    }
    if (card.memory.empty()) {
        refuse("has no memory measurements in its card; export it again");
    }
}

void require_names(const std::string &path, const Card &card, std::vector<std::string> inputs,
                   const std::vector<std::string> &outputs) {
    std::vector<std::string> stated = names_of(card.inputs);
    const std::vector<std::string> gives = names_of(card.outputs());
    const std::string shown = joined(stated), seen = joined(inputs);
    std::sort(stated.begin(), stated.end());
    std::sort(inputs.begin(), inputs.end());
    if (stated == inputs && outputs == gives) return;
    throw Error(QSM_ENGINE_ERROR, path + ": the card contradicts the graph: inputs " + shown +
                                      " -> " + joined(gives) + ", the graph has " + seen +
                                      " -> " + joined(outputs) + "; export it again");
}

}  // namespace qsm::host
