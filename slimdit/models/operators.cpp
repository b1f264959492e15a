// What a model calls a hundred times a step, without Python in between: the kernels of `kernels.cpp`, and oneDNN's
// products with weights that it has in its own layout. `kernels.py` and `linear.py` say what the operators are given.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>

using at::Tensor;
using bf16 = uint16_t;

extern "C" {
void attend(const bf16* qkv, const float* steps, const bf16* bias, bf16* out, long images, long tokens, long heads,
            long size);
void gelu_levels(const bf16* x, const float* steps, const bf16* bias, uint8_t* levels, float* level_steps, long rows,
                 long width);
}

namespace {

constexpr int64_t ZERO = 128;  // where 0 lies among unsigned levels

using Operator = c10::OperatorHandle;

Operator found(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// Boxed, as oneDNN's operators have no interface in C++ that every version of PyTorch shares.
Tensor call(const Operator& op, std::vector<c10::IValue> arguments) {
    op.callBoxed(&arguments);
    return arguments.front().toTensor();
}

// Tensors that are kept for another, for as long as that lives.
class Kept {
  public:
    std::vector<Tensor> find(const Tensor& owner) const {
        const std::lock_guard<std::mutex> guard(lock);
        const auto entry = entries.find(owner.unsafeGetTensorImpl());
        return entry == entries.end() ? std::vector<Tensor>{} : entry->second.tensors;
    }

    void put(const Tensor& owner, std::vector<Tensor> tensors) {
        const std::lock_guard<std::mutex> guard(lock);
        for (auto entry = entries.begin(); entry != entries.end();)
            entry = entry->second.owner.expired() ? entries.erase(entry) : std::next(entry);
        entries.insert_or_assign(owner.unsafeGetTensorImpl(), Entry{Owner(owner.getIntrusivePtr()), std::move(tensors)});
    }

  private:
    using Owner = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
    struct Entry {
        Owner owner;  // holds its address, so that no other tensor gets it
        std::vector<Tensor> tensors;
    };
    mutable std::mutex lock;
    std::unordered_map<c10::TensorImpl*, Entry> entries;
};

Kept& kept() {
    static Kept* all = new Kept;  // never destroyed: PyTorch may be gone before
    return *all;
}

template <class T>
const T* memory(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(tensor->contiguous()) : std::nullopt;
}

Tensor attend_rows(const Tensor& qkv, const std::optional<Tensor>& steps, const std::optional<Tensor>& bias,
                   int64_t images, int64_t heads) {
    const Tensor rows = qkv.to(at::kBFloat16).contiguous();
    const auto row_steps = contiguous(steps), row_bias = contiguous(bias);
    const int64_t inner = rows.size(1) / 3;
    Tensor out = at::empty({rows.size(0), inner}, rows.options());
    attend(memory<bf16>(rows), memory<float>(row_steps), memory<bf16>(row_bias), static_cast<bf16*>(out.data_ptr()),
           images, rows.size(0) / images, heads, inner / heads);
    return out;
}

std::tuple<Tensor, Tensor> gelu_to_levels(const Tensor& x, const Tensor& steps, const std::optional<Tensor>& bias) {
    const Tensor rows = x.to(at::kBFloat16).contiguous(), row_steps = steps.contiguous();
    const auto row_bias = contiguous(bias);
    Tensor levels = at::empty(rows.sizes(), rows.options().dtype(at::kByte));
    Tensor level_steps = at::empty({rows.size(0), 1}, row_steps.options());
    gelu_levels(memory<bf16>(rows), memory<float>(row_steps), memory<bf16>(row_bias),
                static_cast<uint8_t*>(levels.data_ptr()), static_cast<float*>(level_steps.data_ptr()), rows.size(0),
                rows.size(1));
    return {levels, level_steps};
}

Tensor int8_product(const Tensor& levels, const Tensor& weight, const Tensor& scale, at::ScalarType dtype) {
    static const Operator prepack = found("onednn::qlinear_prepack"), product = found("onednn::qlinear_pointwise");
    auto packed = kept().find(weight);
    if (packed.empty()) {
        packed = {call(prepack, {weight.contiguous(), c10::IValue()}),
                  at::zeros({weight.size(0)}, weight.options().dtype(at::kLong))};
        kept().put(weight, packed);
    }
    return call(product, {levels, 1.0, ZERO, packed[0], scale, packed[1], c10::IValue(), 1.0, int64_t{0},
                          static_cast<int64_t>(dtype), "none", c10::List<std::optional<at::Scalar>>(), ""});
}

void prepack_int8(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias, const Tensor& handle) {
    static const Operator prepack = found("onednn::qlinear_prepack");
    const auto zeros = at::zeros({weight.size(0)}, weight.options().dtype(at::kLong));
    std::vector<Tensor> parts{call(prepack, {weight.contiguous(), c10::IValue()}), scale.contiguous(), zeros};
    if (bias) parts.push_back(bias->to(at::kFloat).contiguous());
    kept().put(handle, std::move(parts));
}

Tensor kept_product(const Tensor& levels, const Tensor& handle, int64_t zero, at::ScalarType dtype, double step,
                    int64_t step_zero, bool gelu) {
    static const Operator product = found("onednn::qlinear_pointwise");
    const auto parts = kept().find(handle);
    TORCH_CHECK(!parts.empty(), "slimdit: weights that were packed for another layer, or for a copy of it");
    return call(product, {levels.contiguous(), 1.0, zero, parts[0], parts[1], parts[2],
                          parts.size() > 3 ? c10::IValue(parts[3]) : c10::IValue(), step, step_zero,
                          static_cast<int64_t>(dtype), gelu ? "gelu" : "none",
                          c10::List<std::optional<at::Scalar>>(), gelu ? "tanh" : ""});
}

Tensor static_linear(const Tensor& levels, const Tensor& handle, int64_t zero, int64_t outputs) {
    return kept_product(levels, handle, zero, at::kBFloat16, 1.0, 0, false);
}

Tensor static_gelu_levels(const Tensor& levels, const Tensor& handle, int64_t zero, int64_t outputs, double step,
                          int64_t step_zero) {
    return kept_product(levels, handle, zero, at::kByte, step, step_zero, true);
}

void prepack_linear(const Tensor& weight, const Tensor& handle) {
    static const Operator reorder = found("mkldnn::_reorder_linear_weight");
    kept().put(handle, {call(reorder, {weight.contiguous(), c10::IValue()})});
}

Tensor prepacked_linear(const Tensor& rows, const Tensor& handle, const std::optional<Tensor>& bias, int64_t outputs,
                        bool gelu) {
    static const Operator product = found("mkldnn::_linear_pointwise");
    const auto packed = kept().find(handle);
    TORCH_CHECK(!packed.empty(), "slimdit: weights that were packed for another layer, or for a copy of it");
    return call(product, {rows.contiguous(), packed[0], bias ? c10::IValue(*bias) : c10::IValue(),
                          gelu ? "gelu" : "none", c10::List<std::optional<at::Scalar>>(), gelu ? "tanh" : ""});
}

}  // namespace

TORCH_LIBRARY_IMPL(slimdit, CPU, library) {
    library.impl("attend", attend_rows);
    library.impl("gelu_levels", gelu_to_levels);
    library.impl("int8_product", int8_product);
    library.impl("prepack_int8", prepack_int8);
    library.impl("static_linear", static_linear);
    library.impl("static_gelu_levels", static_gelu_levels);
    library.impl("prepack_linear", prepack_linear);
    library.impl("prepacked_linear", prepacked_linear);
}
