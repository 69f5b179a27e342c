/*
 * For user-mode Linux on a processor with AMX: preloaded by scripts/test-vm.
 *
 * User-mode Linux sets the floating-point registers of its processes by PTRACE_SETREGSET with the largest state that it
 * knows. Linux takes a whole state and nothing less (EFAULT; xstateregs_set() in arch/x86/kernel/fpu/regset.c), and
 * with the tiles of AMX the state is larger: the guest's first process dies. So the rest is added as it is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

typedef long traces(enum __ptrace_request request, ...);

static traces *next;
static char whole[16 << 10]; /* not on the stack, which is a small one of the guest kernel's */

__attribute__((constructor)) static void find(void) {
    next = (traces *)dlsym(RTLD_NEXT, "ptrace");
}

long ptrace(enum __ptrace_request request, ...) {
    va_list arguments;
    va_start(arguments, request);
    int pid = va_arg(arguments, int);
    void *address = va_arg(arguments, void *), *data = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PTRACE_SETREGSET && (long)address == NT_X86_XSTATE) {
        const struct iovec *given = data;
        struct iovec all = {whole, sizeof whole};
        if (next(PTRACE_GETREGSET, pid, address, &all) == 0 && given->iov_len < all.iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return next(request, pid, address, &all);
        }
    }
    return next(request, pid, address, data);
}
