// Reads a card word for word: an unknown or a missing field is an error; what came later may be
// missing.
#include "card.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "error.h"
#include "json.h"

namespace qsm::host {

namespace {

constexpr int64_t kSchema = 1;
constexpr size_t kMostBytes = 4000;
constexpr int64_t kMost = int64_t{1} << 53;  // sizes: sums of a few stay far from overflow
constexpr double kLargest = std::numeric_limits<float>::max();  // networks compute in float32

[[noreturn]] void mismatch(const std::string &where, const std::string &expected) {
    throw Error(QSM_ENGINE_ERROR,
                "the model's card has a wrong " + where + ", expected " + expected);
}

// An object whose fields are taken one by one; the rest are unknown.
class Fields {
  public:
    Fields(const Json &object, std::string where) : object_(object), where_(std::move(where)) {
        if (object.kind != Json::kObject) mismatch(where_, "an object");
    }

    std::string name(const char *field) const { return where_ + "." + field; }

    const Json *find(const char *field) {
        taken_.emplace_back(field);
        return object_.find(field);
    }

    const Json &take(const char *field) {
        if (const Json *found = find(field)) return *found;
        throw Error(QSM_ENGINE_ERROR,
                    "the model's card lacks " + name(field) + "; export the model again");
    }

    void end() const {
        for (const auto &field : object_.fields) {
            if (std::find(taken_.begin(), taken_.end(), field.first) != taken_.end()) continue;
            throw Error(QSM_ENGINE_ERROR,
                        "the model's card has an unknown field " + name(field.first.c_str()) +
                            "; export the model again");
        }
    }

  private:
    const Json &object_;
    std::string where_;
    std::vector<std::string> taken_;
};

std::string string_from(const Json &value, const std::string &where) {
    if (value.kind != Json::kString) mismatch(where, "a string");
    return value.string;
}

int64_t integer_from(const Json &value, const std::string &where) {
    if (value.kind != Json::kInteger) mismatch(where, "a whole number");
    if (value.integer > kMost || value.integer < -kMost) mismatch(where, "a smaller number");
    return value.integer;
}

double number_from(const Json &value, const std::string &where) {
    if (value.kind != Json::kInteger && value.kind != Json::kReal) mismatch(where, "a number");
    if (std::fabs(value.number) > kLargest) mismatch(where, "a smaller number");
    return value.number;
}

template <class Read>
auto optional_from(const Json &value, const std::string &where, Read read) {
    using Value = decltype(read(value, where));
    return value.kind == Json::kNull ? std::optional<Value>() : read(value, where);
}

std::string word_from(const Json &value, const std::string &where,
                      const std::vector<std::string> &words) {
    std::string all;
    for (const std::string &word : words) {
        if (value.kind == Json::kString && value.string == word) return word;
        all += (all.empty() ? "" : " or ") + word;
    }
    mismatch(where, all);
}

template <class Read>
auto list_from(const Json &value, const std::string &where, Read read) {
    if (value.kind != Json::kArray) mismatch(where, "a list");
    std::vector<decltype(read(value, where))> list;
    for (size_t n = 0; n < value.items.size(); ++n) {
        list.push_back(read(value.items[n], where + "[" + std::to_string(n) + "]"));
    }
    return list;
}

template <class Read>
auto three_from(const Json &value, const std::string &where, Read read) {
    if (value.kind != Json::kArray || value.items.size() != 3) mismatch(where, "a list of 3");
    return list_from(value, where, read);
}

std::vector<double> vector_from(const Json &value, const std::string &where) {
    return three_from(value, where, number_from);
}

template <class Read>
auto map_from(const Json &value, const std::string &where, Read read) {
    if (value.kind != Json::kObject) mismatch(where, "an object");
    std::map<std::string, decltype(read(value, where))> map;
    for (const auto &[key, item] : value.fields) map[key] = read(item, where + "." + key);
    return map;
}

Size size_from(const Json &value, const std::string &where) {
    if (value.kind == Json::kString) return {0, value.string};
    return {integer_from(value, where), ""};
}

TensorInfo tensor_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    TensorInfo tensor{string_from(fields.take("name"), fields.name("name")),
                      string_from(fields.take("unit"), fields.name("unit")),
                      list_from(fields.take("shape"), fields.name("shape"), size_from)};
    fields.end();
    return tensor;
}

ReceptiveField receptive_field_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    ReceptiveField field{
        optional_from(fields.take("theoretical"), fields.name("theoretical"), integer_from),
        optional_from(fields.take("halo"), fields.name("halo"), integer_from),
        number_from(fields.take("energy_kept"), fields.name("energy_kept"))};
    fields.end();
    return field;
}

GeometryLimits geometry_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    const auto take = [&](const char *name, auto read) {
        return optional_from(fields.take(name), fields.name(name), read);
    };
    GeometryLimits limits{take("voxel_size_mm", vector_from), take("b0_direction", vector_from),
                          take("voxel_tolerance", number_from),
                          take("b0_tolerance_deg", number_from)};
    fields.end();
    return limits;
}

PriorMap prior_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    PriorMap prior{string_from(fields.take("name"), fields.name("name")),
                   word_from(fields.take("method"), fields.name("method"),
                             {"tkd", "tv", "tv_field", "tv_residual"}),
                   string_from(fields.take("of"), fields.name("of")),
                   integer_from(fields.take("steps"), fields.name("steps")),
                   {}};
    if (const Json *threshold = fields.find("threshold")) {
        prior.threshold = optional_from(*threshold, fields.name("threshold"), number_from);
    }
    fields.end();
    return prior;
}

Anchor anchor_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    Anchor anchor{string_from(fields.take("prior"), fields.name("prior")),
                  number_from(fields.take("threshold"), fields.name("threshold"))};
    fields.end();
    return anchor;
}

Tiles tiles_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    const auto three = [&](const char *name) {
        return three_from(fields.take(name), fields.name(name), integer_from);
    };
    Tiles tiles{three("size"), three("kept"), three("stride"),
                word_from(fields.take("beyond"), fields.name("beyond"), {"zero", "edge"}),
                word_from(fields.take("blend"), fields.name("blend"), {"none", "mean", "ramp"})};
    fields.end();
    return tiles;
}

std::vector<TensorInfo> tensors_from(const Json &value, const std::string &where) {
    return list_from(value, where, tensor_from);
}

std::vector<PriorMap> priors_from(const Json &value, const std::string &where) {
    return list_from(value, where, prior_from);
}

MemoryUse memory_from(const Json &value, const std::string &where) {
    Fields fields(value, where);
    MemoryUse use{integer_from(fields.take("fixed_bytes"), fields.name("fixed_bytes")),
                  integer_from(fields.take("bytes_per_voxel"), fields.name("bytes_per_voxel"))};
    fields.end();
    return use;
}

// What was seen when the model was exported is of no use here, but must be there.
void read_verified(const Json &value, const std::string &where) {
    Fields fields(value, where);
    string_from(fields.take("reference"), fields.name("reference"));
    number_from(fields.take("max_ppb"), fields.name("max_ppb"));
    list_from(fields.take("shapes"), fields.name("shapes"),
              [](const Json &shape, const std::string &at) {
                  return three_from(shape, at, integer_from);
              });
    fields.end();
}

Card card_from(const Json &json) {
    Fields fields(json, "card");
    const auto take = [&](const char *name, auto read) {
        return read(fields.take(name), fields.name(name));
    };
    const auto optional = [](auto read) {
        return [read](const Json &value, const std::string &where) {
            return optional_from(value, where, read);
        };
    };
    const auto word = [](std::vector<std::string> words) {
        return [words](const Json &value, const std::string &where) {
            return word_from(value, where, words);
        };
    };
    const auto map = [](auto read) {
        return [read](const Json &value, const std::string &where) {
            return map_from(value, where, read);
        };
    };
    Card card;
    take("schema", integer_from);
    card.network = take("network", string_from);
    card.task = take("task", word(task_names()));
    card.pipeline =
        take("pipeline", word({"cnn", "lpcnn", "modl", "spinet", "nextqsm", "after"}));
    card.inputs = take("inputs", tensors_from);
    card.output = take("output", tensor_from);
    card.divisor = take("divisor", integer_from);
    card.patchable = take("patchable", word({"yes", "no", "split"}));
    card.why_whole = take("why_whole", optional(string_from));
    card.receptive_field = take("receptive_field", receptive_field_from);
    card.geometry = take("geometry", geometry_from);
    card.normalisation = take("normalisation", map(number_from));
    card.constants = take("constants", map(number_from));
    card.options = take("options", map(string_from));
    card.precision = take("precision", word({"fp32", "fp16", "bf16", "int8"}));
    card.memory = take("memory", map(memory_from));
    take("verified", [](const Json &value, const std::string &where) {
        read_verified(value, where);
        return 0;
    });
    for (const char *name : {"weights_sha256", "licence", "made_by"}) take(name, string_from);
    take("doi", optional(string_from));
    const auto later = [&](const char *name, auto &to, auto read) {
        if (const Json *found = fields.find(name)) to = read(*found, fields.name(name));
    };
    later("axes", card.axes, string_from);
    later("priors", card.priors, priors_from);
    later("anchor", card.anchor, optional(anchor_from));
    later("further_outputs", card.further_outputs, tensors_from);
    later("pad_front", card.pad_front, word({"ceil", "floor", "none"}));
    later("tiles", card.tiles, optional(tiles_from));
    const Json *tkd = json.find("tkd");
    if (tkd && tkd->kind == Json::kNull) fields.find("tkd");  // from before there were prior maps
    fields.end();
    return card;
}

}  // namespace

Card parse_card(const std::string &text) {
    if (text.size() > kMostBytes) {
        throw Error(QSM_ENGINE_ERROR, "the model's card has " + std::to_string(text.size()) +
                                          " bytes, at most " + std::to_string(kMostBytes) + " fit");
    }
    Json json;
    try {
        json = parse_json(text);
    } catch (const std::invalid_argument &error) {
        throw Error(QSM_ENGINE_ERROR, std::string("the model's card is not JSON (") + error.what() +
                                          "); export the model again");
    }
    const Json *schema = json.find("schema");
    if (!schema || schema->kind != Json::kInteger || schema->integer != kSchema) {
        throw Error(QSM_ENGINE_ERROR,
                    "the model's card has another schema, this version reads 1; export the model "
                    "again with this version");
    }
    Card card = card_from(json);
    card.json = text;
    if (const std::string found = contradictions(card); !found.empty()) {
        throw Error(QSM_ENGINE_ERROR, "contradictory card: " + found + "; export the model again");
    }
    return card;
}

}  // namespace qsm::host
