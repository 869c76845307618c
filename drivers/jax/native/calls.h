// What XLA hands to a kernel and asks of it, and whether it has the shapes that the kernel takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <numeric>

#include "common.h"

namespace {

constexpr auto kFloat32 = XLA_FFI_DataType_F32, kBfloat16 = XLA_FFI_DataType_BF16, kInt32 = XLA_FFI_DataType_S32;

// The arguments of a call, by place, and its attributes, by place in the order of their names.
struct Call {
  XLA_FFI_CallFrame* frame;

  XLA_FFI_Buffer& arg(int i) const { return *static_cast<XLA_FFI_Buffer*>(frame->args.args[i]); }
  XLA_FFI_Buffer& ret(int i) const { return *static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i]); }
  template <typename T>
  T attr(int i) const {
    return *static_cast<T*>(static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[i])->value);
  }
  template <typename T>
  T* data(int i) const {
    return static_cast<T*>(arg(i).data);
  }
  Pool pool() const { return {frame->api, frame->ctx}; }
  bool has(int args, int rets, int attrs) const {
    return frame->args.size == args && frame->rets.size == rets && frame->attrs.size == attrs;
  }
  XLA_FFI_Error* invalid(const char* message) const {
    XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                   XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame->api->XLA_FFI_Error_Create(&args);
  }
};

inline bool floating(const XLA_FFI_Buffer& x) { return x.dtype == kFloat32 || x.dtype == kBfloat16; }

inline bool shaped(const XLA_FFI_Buffer& x, XLA_FFI_DataType type, std::initializer_list<int64_t> dims) {
  return x.dtype == type && x.rank == int64_t(dims.size()) && std::equal(dims.begin(), dims.end(), x.dims);
}

// A layer's pages: two arrays [pages, kv_heads, page_tokens, head_dim], or one of any shape and a number []: keys
// begin so many blocks on, values a block later. They are written in place.
struct Cache {
  XLA_FFI_Buffer *keys, *values;
  int64_t first, block, pages;
  bool paired;

  // Those at the arguments from ``arg`` on, which are also the last results.
  static Cache of(const Call& call, int arg, int64_t kv_heads, int64_t page_tokens, int64_t head_dim) {
    int64_t block = kv_heads * page_tokens * head_dim;
    Cache found{&call.arg(arg), &call.arg(arg + 1), 0, block, 0, call.frame->rets.size == 2};
    if (found.block <= 0) return found;
    const XLA_FFI_Buffer& keys = *found.keys;
    int64_t size = std::accumulate(keys.dims, keys.dims + keys.rank, int64_t{1}, std::multiplies<int64_t>());
    found.pages = size / found.block;
    if (found.paired && shaped(*found.values, kInt32, {})) {
      found.first = *call.data<int32_t>(arg + 1);
      found.pages -= found.first + 1;
    }
    return found;
  }

  // What is wrong with it, if anything.
  const char* wrong(const Call& call, int64_t kv_heads, int64_t page_tokens, int64_t head_dim) const {
    if (block <= 0) return "the cache needs heads and pages that are not empty";
    if (!floating(*keys) && keys->dtype != XLA_FFI_DataType_U16) return "the cache must be float32 or bfloat16";
    if (paired && !shaped(*values, kInt32, {})) return "the layer's first block must be one int32";
    if (!paired && !(shaped(*keys, keys->dtype, {pages, kv_heads, page_tokens, head_dim}) &&
                     shaped(*values, keys->dtype, {pages, kv_heads, page_tokens, head_dim}))) {
      return "keys and values must both be [pages, kv_heads, page_tokens, head_dim]";
    }
    if (first < 0 || pages <= 0) return "the layer's blocks must be in the cache";
    if (call.ret(1).data != keys->data || (!paired && call.ret(2).data != values->data)) {
      return "the cache must be aliased to the result";
    }
    return nullptr;
  }

  bool wide() const { return keys->dtype == kFloat32; }
  template <typename T>
  T* key_data() const {
    return static_cast<T*>(keys->data) + first * block;
  }
  template <typename T>
  T* value_data() const {
    return paired ? key_data<T>() + block : static_cast<T*>(values->data);
  }
};

// call(X, T) with numbers of the types of new heads and of the cache.
template <typename Work>
void typed(bool wide, bool wide_cache, const Work& work) {
  if (wide && wide_cache) work(float{}, float{});
  if (wide && !wide_cache) work(float{}, bfloat16{});
  if (!wide && wide_cache) work(bfloat16{}, float{});
  if (!wide && !wide_cache) work(bfloat16{}, bfloat16{});
}

// Answers XLA's question for the version of its interface, or does the work.
XLA_FFI_Error* answer(XLA_FFI_CallFrame* frame, XLA_FFI_Error* (*work)(const Call&)) {
  auto* extension = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  if (extension && extension->extension_base.type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Api_Version& version = extension->metadata->api_version;
    version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    extension->metadata->traits = 0;
    extension->metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  return work({frame});
}

}  // namespace
