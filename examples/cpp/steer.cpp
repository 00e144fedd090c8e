// Greedy decoding of an exported float32 folder, with the steering's strength set per run.
// Needs onnxruntime's own header alone, which is a face of its C API: see README.md.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>

using Integers = std::vector<std::int64_t>;

int main(int argc, char** argv) try {
  if (argc < 5) return std::fprintf(stderr, "steer FOLDER STRENGTH N_TOKENS TOKEN_ID...\n"), 2;
  const std::string folder = argv[1];
  std::vector<float> strength = {std::strtof(argv[2], nullptr)};
  Integers ids, mask;
  for (int i = 4; i < argc; ++i) ids.push_back(std::atoll(argv[i]));

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "steer");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary((folder + "/libgrains_ort.so").c_str());
  Ort::Session session(env, (folder + "/model.onnx").c_str(), options);
  Ort::AllocatorWithDefaultOptions allocator;
  const auto cpu = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto view = [&](auto& data, const Integers& shape) {
    return Ort::Value::CreateTensor(cpu, data.data(), data.size(), shape.data(), shape.size());
  };
  Ort::IoBinding run(session);
  run.BindInput("grains.strength", view(strength, {1}));  // read anew by every run

  // After the first three inputs and after the logits: each block's keys and values, in one order.
  std::vector<std::string> pasts, outputs = {"logits"};
  for (std::size_t i = 3; i < session.GetInputCount(); ++i) {
    pasts.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    outputs.emplace_back(session.GetOutputNameAllocated(i - 2, allocator).get());
    auto shape = session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1, shape[2] = 0;  // the batch, the tokens seen so far
    const auto none = Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size());
    run.BindInput(pasts.back().c_str(), none);
  }
  for (long left = std::atol(argv[3]); left > 0; --left) {
    const auto n = static_cast<std::int64_t>(ids.size());
    Integers positions(ids.size());
    std::iota(positions.begin(), positions.end(), mask.size());
    mask.resize(mask.size() + ids.size(), 1);
    run.BindInput("input_ids", view(ids, {1, n}));
    run.BindInput("position_ids", view(positions, {1, n}));
    run.BindInput("attention_mask", view(mask, {1, positions.back() + 1}));
    for (const auto& name : outputs) run.BindOutput(name.c_str(), cpu);
    session.Run(Ort::RunOptions{}, run);
    const auto results = run.GetOutputValues();
    for (std::size_t i = 0; i < pasts.size(); ++i) run.BindInput(pasts[i].c_str(), results[i + 1]);
    const auto vocabulary = results[0].GetTensorTypeAndShapeInfo().GetShape()[2];
    const float* last = results[0].GetTensorData<float>() + (n - 1) * vocabulary;
    ids = {std::max_element(last, last + vocabulary) - last};
    std::printf("%lld\n", static_cast<long long>(ids[0]));
  }
} catch (const Ort::Exception& error) {
  return std::fprintf(stderr, "onnxruntime: %s\n", error.what()), 1;
}
