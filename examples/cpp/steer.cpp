// Greedy decoding of an exported float32 folder, with the steering's strength set per run:
//   steer FOLDER STRENGTH N_TOKENS TOKEN_ID...
// Needs onnxruntime's own header alone, which is a face of its C API: see README.md.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

template <typename T>
static Ort::Value view(std::vector<T>& data, std::vector<std::int64_t> shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor(memory, data.data(), data.size(), shape.data(), shape.size());
}

static int decode(const std::string& folder, float strength, long n_new,
                  std::vector<std::int64_t> ids) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "steer");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary((folder + "/libgrains_ort.so").c_str());
  Ort::Session session(env, (folder + "/model.onnx").c_str(), options);
  Ort::AllocatorWithDefaultOptions allocator;

  // After the first three inputs and after the logits: each block's keys and values, in one order.
  std::vector<std::string> names = {"input_ids", "attention_mask", "position_ids",
                                    "grains.strength"};
  std::vector<std::string> results = {"logits"};
  std::vector<Ort::Value> cache;
  for (std::size_t i = 3; i < session.GetInputCount(); ++i) {
    names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    results.emplace_back(session.GetOutputNameAllocated(i - 2, allocator).get());
    auto shape = session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1;  // batch
    shape[2] = 0;  // tokens seen so far
    cache.push_back(Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size()));
  }
  std::vector<const char*> inputs, outputs;
  for (const auto& name : names) inputs.push_back(name.c_str());
  for (const auto& name : results) outputs.push_back(name.c_str());

  std::vector<float> strengths = {strength};
  std::vector<std::int64_t> mask;
  for (; n_new > 0; --n_new) {
    const auto n = static_cast<std::int64_t>(ids.size());
    std::vector<std::int64_t> positions;
    for (std::int64_t i = 0; i < n; ++i) {
      positions.push_back(static_cast<std::int64_t>(mask.size()));
      mask.push_back(1);
    }
    std::vector<Ort::Value> feeds;
    feeds.push_back(view(ids, {1, n}));
    feeds.push_back(view(mask, {1, static_cast<std::int64_t>(mask.size())}));
    feeds.push_back(view(positions, {1, n}));
    feeds.push_back(view(strengths, {1}));
    for (auto& past : cache) feeds.push_back(std::move(past));
    auto present = session.Run(Ort::RunOptions{nullptr}, inputs.data(), feeds.data(), feeds.size(),
                               outputs.data(), outputs.size());
    const auto vocabulary = present[0].GetTensorTypeAndShapeInfo().GetShape()[2];
    const float* last = present[0].GetTensorData<float>() + (n - 1) * vocabulary;
    ids = {std::max_element(last, last + vocabulary) - last};
    std::printf("%lld\n", static_cast<long long>(ids[0]));
    cache.assign(std::make_move_iterator(present.begin() + 1),
                 std::make_move_iterator(present.end()));
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc < 5) return std::fprintf(stderr, "steer FOLDER STRENGTH N_TOKENS TOKEN_ID...\n"), 2;
  std::vector<std::int64_t> ids;
  for (int i = 4; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  try {
    return decode(argv[1], std::strtof(argv[2], nullptr), std::atol(argv[3]), ids);
  } catch (const Ort::Exception& error) {
    return std::fprintf(stderr, "onnxruntime: %s\n", error.what()), 1;
  }
}
