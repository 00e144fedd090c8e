// grains_ext._C: what was built and what this machine runs. The ops themselves are not here: they
// are in libgrains_torch.so and libgrains_ort.so, which need no Python.
#include <dlfcn.h>
#include <link.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "grains/cpu.h"
#include "grains/launch_plan.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = GRAINS_VERSION;
  info["cxx_compiler"] = GRAINS_CXX_COMPILER;
#ifdef GRAINS_WITH_CUDA
  info["with_cuda"] = true;
  info["cuda_compiler"] = GRAINS_CUDA_COMPILER;
  info["cuda_architectures"] = GRAINS_CUDA_ARCHITECTURES;
#else
  info["with_cuda"] = false;
  info["cuda_compiler"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto isa : grains::cpu::kIsas) {
    if (grains::cpu::isa_supported(isa)) names.emplace_back(grains::cpu::isa_name(isa));
  }
  return names;
}

std::string cpu_isa() { return grains::cpu::isa_name(grains::cpu::current_isa()); }

// Each grains library holds its own copy of the kernels, and with it its own choice.
void set_in_loaded_libraries(const char* isa) {
  dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void* name) {
        if (std::strstr(object->dlpi_name, "libgrains_") == nullptr) return 0;
        void* library = dlopen(object->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) return 0;
        using SetIsa = int (*)(const char*);
        if (auto set = reinterpret_cast<SetIsa>(dlsym(library, "grains_set_cpu_isa"))) {
          set(static_cast<const char*>(name));
        }
        dlclose(library);
        return 0;
      },
      const_cast<char*>(isa));
}

void set_cpu_isa(const std::string& name) {
  for (const auto isa : grains::cpu::kIsas) {
    if (name != grains::cpu::isa_name(isa)) continue;
    if (!grains::cpu::set_isa(isa)) break;
    set_in_loaded_libraries(name.c_str());
    setenv("GRAINS_CPU_ISA", name.c_str(), 1);  // for those that are loaded later
    return;
  }
  std::string expected;
  for (const auto& isa : supported_isas()) expected += (expected.empty() ? "" : ", ") + isa;
  throw py::value_error("set_cpu_isa: '" + name +
                        "' is not one of the instruction sets that this "
                        "processor and this build support: " +
                        expected);
}

grains::DType dtype_of(const std::string& name) {
  if (name == "float32") return grains::DType::kFloat32;
  if (name == "float16") return grains::DType::kFloat16;
  if (name == "bfloat16") return grains::DType::kBFloat16;
  throw py::value_error("launch_plan: dtype is '" + name +
                        "', expected 'float32', 'float16' or 'bfloat16'");
}

py::dict launch_plan(std::int64_t rows, std::int64_t dim, const std::string& dtype,
                     std::int32_t compute_capability, bool aligned) {
  const auto plan = grains::cuda::plan(rows, dim, dtype_of(dtype), compute_capability, aligned);
  py::dict result;
  result["threads"] = plan.threads;
  result["rows_per_block"] = plan.rows_per_block;
  result["vector_elements"] = plan.vector_elements;
  result["elements_per_thread"] = plan.elements_per_thread;
  result["blocks"] = plan.blocks;
  result["programmatic_launch"] = plan.programmatic_launch;
  result["stays"] = plan.stays;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU instruction sets and CUDA launch plans of grains_ext.";
  m.def("build_info", &build_info,
        "The version, the compilers, and the CUDA architectures that were compiled in.");
  m.def("cpu_isa", &cpu_isa, "The instruction set that the CPU kernels use now.");
  m.def("supported_isas", &supported_isas,
        "The instruction sets that were compiled in and that this processor has, slowest first.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "Choose the instruction set of every grains library in this process.");
  m.def("launch_plan", &launch_plan, py::arg("rows"), py::arg("dim"), py::arg("dtype"),
        py::arg("compute_capability"), py::arg("aligned") = true,
        "The CUDA launch of a row kernel; compute_capability is 10 * major + minor.");
}
