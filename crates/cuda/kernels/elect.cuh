// One lane of a warp, so that the compiler knows that it is one.
#pragma once

namespace ptx {

// True in one lane, always the same, of a warp whose lanes all come here. Operands of a bulk copy
// that it asks for go to uniform registers at once; behind `threadIdx.x == 0` they go there by a
// loop over the lanes, which makes a request some 150 clocks long.
static __device__ __forceinline__ bool elect_one() {
    unsigned mine;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(mine));
    return mine != 0;
}

}  // namespace ptx
