/*
 * The system calls that a job may make: a seccomp filter for the command and all that it starts, not for init.
 *
 * Denied are the calls that the default profiles of docker and podman deny to a container without capabilities. Most of
 * them a job could not make anyway, for want of a capability; this is the second lock, and it keeps the kernel's less tried
 * code out of reach where the first has nothing to say (user namespaces, io_uring, AF_ALG).
 *
 * By name it is a deny-list, and yet a call that was never judged is denied: a number above NEWEST or in the hole of the
 * numbering is ENOSYS; a socket's family or a flag of unshare(2) is allowed only when listed. A list of the allowed calls
 * would say the same of every number, in 300 names instead of 70, which no reviewer reads. An author who raises NEWEST
 * judges the calls that come in with it. Calls that no Linux with mount_setattr(2), which we need, still has (nfsservctl,
 * _sysctl, create_module, vserver, ...) have no line: the kernel's own ENOSYS is as good.
 *
 * EPERM for a denied call, as in a container. ENOSYS where libc has an older way: it takes that. Only a program for another
 * architecture (32-bit x86) is killed: its numbers mean other calls, and no answer would help it. x32 needs no line: its
 * numbers have bit 30, so they are above NEWEST. So is -1, which a tracer sets to skip a call: the kernel's answer is
 * ENOSYS then, too.
 *
 * Stricter than docker's: adjtimex(2) and clock_adjtime(2) even to read, every socket family but four, and all 32-bit
 * programs.
 *
 * Allowed on purpose: ptrace(2), process_vm_readv(2) and process_vm_writev(2), for strace and gdb. They reach the job's own
 * processes and no others: another job's is not in our PID namespace, and init is root and not dumpable. The filter looks
 * after a tracer has (Linux 4.8), so a tracer cannot put a denied call in the place of another. A job may also add filters,
 * for its own sandboxes: the strictest of all decides.
 *
 * Of an argument that the kernel takes as an int, only the low word may be compared: the kernel drops the high one, so a
 * comparison of both would let TIOCSTI + 2^32 through.
 */
#include "init.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/netlink.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>

/* Little-endian, and clone(2) with its flags first: two things to look at before there is a third. */
#if defined __x86_64__ && !defined __ILP32__
#define ARCHITECTURE AUDIT_ARCH_X86_64
enum { LAST_OLD = 335 }; /* uretprobe, which the kernel itself makes for a tracer outside */
#elif defined __aarch64__ && !defined __ILP32__ && !defined __AARCH64EB__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
enum { LAST_OLD = 294 }; /* kexec_file_load */
#else
#error "no system call filter for this architecture"
#endif

/* From FIRST_NEW on a call has the same number everywhere. Here because older headers lack some. */
/* clang-format off */
enum {
    FIRST_NEW = 424,
    IO_URING_SETUP = 425, IO_URING_ENTER, IO_URING_REGISTER,
    OPEN_TREE, MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT, FSPICK,
    CLONE3 = 435,
    PIDFD_GETFD = 438,
    PROCESS_MADVISE = 440,
    MOUNT_SETATTR = 442, QUOTACTL_FD,
    SET_MEMPOLICY_HOME_NODE = 450,
    LSM_GET_SELF_ATTR = 459, LSM_SET_SELF_ATTR, LSM_LIST_MODULES,
    NEWEST = 466, /* removexattrat, Linux 6.13 */
};
/* clang-format on */

/* CLONE_NEWTIME has no place in clone(2): its bit is one of the exit signal there. */
#define NEW_NAMESPACES                                                                                                     \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
#define UNSHARABLE (CLONE_FILES | CLONE_FS | CLONE_SYSVSEM | CLONE_THREAD | CLONE_SIGHAND | CLONE_VM)
/*
 * PER_LINUX32, UNAME26: the answer of uname(2). ADDR_NO_RANDOMIZE, unlike docker: debuggers and sanitizers turn it on for
 * their own programs, and a job has no more privileged program that this could expose.
 */
#define PERSONALITIES (0x0008 | 0x0020000 | 0x0040000)
#define GET_PERSONALITY 0xffffffff

#define LOAD(member) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, member))
#define LOAD_LOW(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (i))
#define LOAD_HIGH(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + 8 * (i) + 4)
/* How many instructions to skip when it is so, and when not. */
#define EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (yes), (no))
#define ABOVE(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, (value), (yes), (no))
#define ANY_BIT(mask, yes, no) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (uint32_t)(mask), (yes), (no))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define KILL BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)
#define FAIL(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
/* The rule for one call: its number is still loaded after the rule when it was another call. */
#define ON(number, rule_length) EQUAL(number, 0, rule_length)
#define DENY(number) ON(number, 1), FAIL(EPERM)
#define DENY_RANGE(first, last) ABOVE((first) - 1, 0, 2), ABOVE(last, 1, 0), FAIL(EPERM)

/* clang-format off */
static const struct sock_filter FILTER[] = {
    LOAD(arch), EQUAL(ARCHITECTURE, 1, 0), KILL,
    LOAD(nr),
    ABOVE(NEWEST, 2, 0), ABOVE(FIRST_NEW - 1, 2, 0), ABOVE(LAST_OLD, 0, 1), FAIL(ENOSYS),

    /* Looked at each time, as their arguments differ, and common: so first. */
    /*
     * Typing into a terminal that is not ours alone. And attributes of a file other than its contents: its project, by which a
     * quota counts it, and flags that keep root from removing it. Programs that copy flags expect EOPNOTSUPP of a file
     * system that has none. file_setattr(2) does the same and is above NEWEST.
     */
    ON(__NR_ioctl, 8),
        LOAD_LOW(1), EQUAL(TIOCSTI, 4, 0), EQUAL(TIOCLINUX, 3, 0),
        EQUAL(FS_IOC_SETFLAGS, 3, 0), EQUAL(FS_IOC_FSSETXATTR, 2, 0), ALLOW,
        FAIL(EPERM), FAIL(EOPNOTSUPP),
    /*
     * AF_VSOCK talks to the hypervisor, in no namespace; AF_ALG and the rest load little-read modules, as do protocols
     * of the internet but for the usual ones. Of netlink only routes, which libc asks for addresses: uevents tell of
     * the host's devices in every network namespace of the first user namespace.
     */
    ON(__NR_socket, 16),
        LOAD_LOW(0), EQUAL(AF_UNIX, 13, 0), EQUAL(AF_INET, 5, 0), EQUAL(AF_INET6, 4, 0),
        EQUAL(AF_NETLINK, 1, 0), FAIL(EPERM),
        LOAD_LOW(2), EQUAL(NETLINK_ROUTE, 7, 6),
        LOAD_LOW(2), EQUAL(IPPROTO_IP, 5, 0), EQUAL(IPPROTO_TCP, 4, 0), EQUAL(IPPROTO_UDP, 3, 0),
        EQUAL(IPPROTO_ICMP, 2, 0), EQUAL(IPPROTO_ICMPV6, 1, 0), FAIL(EPERM), ALLOW,
    ON(__NR_socketpair, 4), /* only AF_UNIX has pairs that are of use */
        LOAD_LOW(0), EQUAL(AF_UNIX, 0, 1), ALLOW, FAIL(EPERM),
    ON(__NR_clone, 4),
        LOAD_LOW(0), ANY_BIT(NEW_NAMESPACES, 0, 1), FAIL(EPERM), ALLOW,
    ON(CLONE3, 1), FAIL(ENOSYS), /* its flags are in memory, which no filter can read: libc takes clone */
    ON(__NR_unshare, 6),
        LOAD_HIGH(0), EQUAL(0, 0, 2), LOAD_LOW(0), ANY_BIT(~UNSHARABLE, 0, 1), FAIL(EPERM), ALLOW,
    ON(__NR_personality, 5),
        LOAD_LOW(0), EQUAL(GET_PERSONALITY, 2, 0), ANY_BIT(~PERSONALITIES, 0, 1), FAIL(EPERM), ALLOW,
    /* The limit of core files stays 1, see privilege.c. No error: gpg and ssh-agent end when they cannot set 0. */
    ON(__NR_prlimit64, 8),
        LOAD_LOW(1), EQUAL(RLIMIT_CORE, 0, 5), LOAD_LOW(2), EQUAL(0, 0, 2), LOAD_HIGH(2), EQUAL(0, 1, 0),
        FAIL(0), ALLOW,
    ON(__NR_setrlimit, 4),
        LOAD_LOW(0), EQUAL(RLIMIT_CORE, 0, 1), FAIL(0), ALLOW,

    /* other namespaces and mounts; files by handle, past the mounts that hide them */
    DENY(__NR_setns), DENY(__NR_chroot), DENY(__NR_pivot_root), DENY(__NR_mount), DENY(__NR_umount2),
    DENY_RANGE(OPEN_TREE, FSPICK), DENY(MOUNT_SETATTR), DENY(__NR_open_by_handle_at),
    /* keyrings: in no namespace, and counted against a uid that the client's other jobs have too */
    DENY(__NR_keyctl), DENY(__NR_add_key), DENY(__NR_request_key),
    /* large parts of the kernel that a job has no need of, and where many of its holes were */
    DENY(__NR_bpf), DENY(__NR_perf_event_open), DENY(__NR_userfaultfd),
    DENY_RANGE(IO_URING_SETUP, IO_URING_REGISTER), DENY(__NR_fanotify_init), DENY(__NR_fanotify_mark),
    DENY_RANGE(LSM_GET_SELF_ATTR, LSM_LIST_MODULES),
    /* another process's descriptors and memory, beyond a debugger's needs; where memory lies */
    DENY(__NR_kcmp), DENY(PIDFD_GETFD), DENY(PROCESS_MADVISE),
    DENY(__NR_mbind), DENY(__NR_get_mempolicy), DENY(__NR_set_mempolicy), DENY(SET_MEMPOLICY_HOME_NODE),
    DENY(__NR_migrate_pages), DENY(__NR_move_pages),
    /* the machine: its kernel, clock, name, log, swap, quotas, accounting, terminals and ports */
    DENY(__NR_kexec_load), DENY(__NR_kexec_file_load), DENY(__NR_reboot),
    DENY(__NR_init_module), DENY(__NR_finit_module), DENY(__NR_delete_module),
    DENY(__NR_settimeofday), DENY(__NR_clock_settime), DENY(__NR_adjtimex), DENY(__NR_clock_adjtime),
    DENY(__NR_sethostname), DENY(__NR_setdomainname), DENY(__NR_syslog),
    DENY(__NR_swapon), DENY(__NR_swapoff), DENY(__NR_quotactl), DENY(QUOTACTL_FD), DENY(__NR_acct),
    DENY(__NR_vhangup), DENY(__NR_lookup_dcookie),
#ifdef __x86_64__
    DENY(__NR_iopl), DENY(__NR_ioperm), DENY(__NR_uselib), DENY(__NR_ustat), DENY(__NR_sysfs),
#endif
    ALLOW,
};
/* clang-format on */

/*
 * For the calling task alone, which has no_new_privs. Without SPEC_ALLOW: where an older kernel ties its
 * mitigations of speculation to seccomp, it is a job that should have them.
 */
int filter_system_calls(void) {
    struct sock_fprog program = {.len = sizeof FILTER / sizeof *FILTER, .filter = (struct sock_filter *)FILTER};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
