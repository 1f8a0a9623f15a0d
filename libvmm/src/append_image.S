/* The append kernel, embedded. The Makefile names the files:
 *   VMM_APPEND_FATBIN  nvcc's output, or an empty file where there was no nvcc
 *   VMM_APPEND_HIPFB   clang's for AMD GPUs, or an empty file where there was no HIP compiler
 *   VMM_APPEND_PTX     append.ptx as checked in: text, so it gets a NUL behind it
 * `_end` is one past the last byte, the NUL included. Two equal labels: nothing there. */
    .macro image name, path
    .hidden \name
    .hidden \name\()_end
    .globl  \name
    .globl  \name\()_end
    .balign 4096 /* where HIP has its code objects */
\name:
    .incbin "\path"
    .endm

    .section .rodata
    image vmm_append_fatbin, VMM_APPEND_FATBIN
vmm_append_fatbin_end:

    image vmm_append_hipfb, VMM_APPEND_HIPFB
vmm_append_hipfb_end:

    image vmm_append_ptx, VMM_APPEND_PTX
    .byte 0
vmm_append_ptx_end:

    .section .note.GNU-stack, "", %progbits
