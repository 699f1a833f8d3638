// Wall clock, and the energy and clock of the first GPU by NVML, for timings at the power limit.
#pragma once
#include <dlfcn.h>
#include <chrono>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// The first GPU's counters; zeros without NVML.
struct Nvml {
    void* device = nullptr;
    int (*total)(void*, unsigned long long*);
    int (*clock_of)(void*, int, unsigned*);
    Nvml() {
        void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW);
        if (nvml == nullptr) return;
        const auto init = (int (*)())dlsym(nvml, "nvmlInit_v2");
        const auto handle = (int (*)(unsigned, void**))dlsym(nvml, "nvmlDeviceGetHandleByIndex_v2");
        total = (decltype(total))dlsym(nvml, "nvmlDeviceGetTotalEnergyConsumption");
        clock_of = (decltype(clock_of))dlsym(nvml, "nvmlDeviceGetClockInfo");
        if (init() != 0 || handle(0, &device) != 0) device = nullptr;
    }
    double joules() {
        unsigned long long millijoules = 0;
        return device && total(device, &millijoules) == 0 ? millijoules * 1e-3 : 0;
    }
    unsigned clock() {  // of the multiprocessors, MHz
        unsigned mhz = 0;
        return device && clock_of(device, 1, &mhz) == 0 ? mhz : 0;
    }
};
static Nvml& nvml() {
    static Nvml it;
    return it;
}
