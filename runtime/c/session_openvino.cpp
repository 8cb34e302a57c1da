// Networks in OpenVINO on the CPU, compiled for one shape at a time.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include <openvino/runtime/core.hpp>

#include "error.h"
#include "graph.h"
#include "session.h"

namespace qsm::host {

namespace {

constexpr std::chrono::milliseconds kBetweenPolls(100);

// The precision is always stated: left alone, OpenVINO computes in bf16 on CPUs that can.
ov::AnyMap openvino_settings(int threads) {
    return {ov::hint::inference_precision(ov::element::f32),
            ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
            ov::inference_num_threads(threads)};
}

// Runs a body that calls OpenVINO. `what` says what failed, `fix` what to do about it.
template <class Body>
auto openvino_call(const char *what, const char *fix, Body &&body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &error) {
        throw Error(QSM_ENGINE_ERROR,
                    std::string(what) + " (" + last_line(error.what()) + "); " + fix);
    }
}

std::vector<std::string> names_of(const std::vector<ov::Output<ov::Node>> &ports) {
    std::vector<std::string> names;
    for (const auto &port : ports) names.push_back(port.get_any_name());
    return names;
}

bool has_word(const std::string &text, const std::set<std::string> &wanted) {
    std::istringstream words(text);
    return std::any_of(std::istream_iterator<std::string>(words), {},
                       [&](const std::string &word) { return wanted.count(word) > 0; });
}

// Whether products of INT8 are summed in INT32; elsewhere sums of two saturate at INT16. OpenVINO
// says that any x86 CPU is able of INT8.
bool sums_in_int32() {
    std::ostringstream text;
    text << std::ifstream("/proc/cpuinfo").rdbuf();
    return has_word(text.str(), {"avx512_vnni", "avx_vnni", "amx_int8"});
}

// A file in memory: from a string OpenVINO drops inputs that nothing uses.
class MemoryFile {
  public:
    explicit MemoryFile(const std::string &data) : number_(memfd_create("graph", MFD_CLOEXEC)) {
        for (size_t done = 0; done < data.size();) {
            const ssize_t written = write(number_, &data[done], data.size() - done);
            if (written < 0) throw std::bad_alloc();
            done += static_cast<size_t>(written);
        }
    }
    ~MemoryFile() { close(number_); }
    MemoryFile(const MemoryFile &) = delete;
    MemoryFile &operator=(const MemoryFile &) = delete;

    std::string name() const { return "/proc/self/fd/" + std::to_string(number_); }

  private:
    int number_;
};

class OpenVinoSession final : public Session {
  public:
    OpenVinoSession(const std::string &path, const std::string &graph, int threads)
        : settings_(openvino_settings(threads)) {
        require_onnx(path, graph);
        require_bounded_graph(path, graph);
        try {
            model_ = core_.read_model(MemoryFile(graph).name());
        } catch (const std::exception &error) {
            throw cannot_load(path, error.what());
        }
        const bool has_card = model_->has_rt_info("framework", "qsm_deploy.card");
        card_ = read_card(
            path, has_card ? model_->get_rt_info<std::string>("framework", "qsm_deploy.card") : "");
        require_names(path, card_, names_of(model_->inputs()), names_of(model_->outputs()));
        // What the graph says of INT8, in float32, unless that was found accurate at export.
        const auto int8_in = card_.options.find("int8_in");
        const bool accurate = int8_in != card_.options.end() && has_word(int8_in->second, {backend()});
        if (!accurate || !sums_in_int32()) settings_["LP_TRANSFORMS_MODE"] = std::string("NO");
    }

    const char *backend() const override { return "openvino"; }

    const char *precision() const override {
        return settings_.count("LP_TRANSFORMS_MODE") ? "fp32" : "int8";
    }

    const float *run(const std::vector<Tensor> &inputs,
                     const std::function<void()> &poll) override {
        openvino_call("OpenVINO failed", "export the model again", [&] {
            prepare(inputs);
            for (const Tensor &input : inputs) {
                // Inputs are only read; ov::Tensor has no form for that.
                request_.set_tensor(input.name, ov::Tensor(ov::element::f32, ov::Shape(input.shape),
                                                           const_cast<float *>(input.data)));
            }
            request_.start_async();
        });
        finish(poll);
        const ov::Tensor output = request_.get_output_tensor();
        const ov::Shape shape = output.get_shape();
        require_output(card_, inputs[0].shape, {shape.begin(), shape.end()},
                       output.get_element_type().to_string());
        return output.data<const float>();
    }

  private:
    // Shapes are fixed before compiling, which halves the memory of dynamic ones.
    void prepare(const std::vector<Tensor> &inputs) {
        std::map<std::string, ov::PartialShape> shapes;
        for (const Tensor &input : inputs) shapes[input.name] = ov::Shape(input.shape);
        if (shapes == shapes_) return;
        shapes_.clear();
        request_ = {};
        model_->reshape(shapes);
        request_ = core_.compile_model(model_, "CPU", settings_).create_infer_request();
        shapes_ = shapes;
    }

    // Waits for the end of what was started, which a cancelled request reaches after an operator.
    void finish(const std::function<void()> &poll) {
        const auto ended = [&] {
            return openvino_call("OpenVINO failed", "export the model again",
                                 [&] { return request_.wait_for(kBetweenPolls); });
        };
        try {
            while (!ended()) poll();
        } catch (...) {
            try {
                request_.cancel();
            } catch (const ov::Exception &) {  // then to its end
            }
            try {
                request_.wait();  // inputs are the caller's
            } catch (...) {  // that it was cancelled, or what is thrown already
            }
            throw;
        }
    }

    static Error cannot_load(const std::string &path, const std::string &why) {
        if (why.find("DipoleConv") != std::string::npos) {
            return {QSM_ENGINE_ERROR, path +
                                          ": OpenVINO has no operator qsm::DipoleConv; export "
                                          "the network with --dipole-op matmul"};
        }
        return {QSM_ENGINE_ERROR, path + ": OpenVINO cannot load it (" + last_line(why) + ")"};
    }

    ov::Core core_;
    ov::AnyMap settings_;
    std::shared_ptr<ov::Model> model_;
    ov::InferRequest request_;
    std::map<std::string, ov::PartialShape> shapes_;
};

}  // namespace

std::unique_ptr<Session> open_onnx_session(const std::string &path, const std::string &graph,
                                           int threads) {
    return std::make_unique<OpenVinoSession>(path, graph, threads);
}

}  // namespace qsm::host
