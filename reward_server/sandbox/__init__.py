"""Runs untrusted code: the answers of a model that is being trained to please a verifier, and so to fool it.

    from reward_server.sandbox.supervisor import CodeSandbox
    with sandbox.open(Limits()) as session:
        session.load(code, seconds=5)
        value = session.call("add", [1, 2], {}, seconds=5).value

A session is a process of its own, forked from a warm interpreter (`zygote`), confined for ever before it sees any code (`confine`), used once, and
ended with all that it has started (`session`). The server compares; what is right is never told to the process.

Tiers, chosen at the start by what the kernel allows and by attacks that must fail (`probe`):

    namespaces  user, mount, pid, net, ipc, uts namespaces; a root with nothing but the interpreter, its libraries and the tool chain, read-only;
                4 devices; a small file system in memory; and all of the next
    landlock    Landlock, the list of allowed kernel calls, no capabilities, no_new_privs, limits, an unprivileged user, a folder that is watched
    outer       without Landlock, inside a sandbox that the operator declares, and as root, so that a job has another user than the server; without
                seccomp nothing is run at all

Covered (tests/integration/test_sandbox_attacks.py, _replies.py, _sessions.py and _leaks.py have an attack for each line, and run them in both tiers,
as root and as an ordinary user):

    time        endless loops, also with signals ignored or all exceptions caught; sleeps, dead waits, pathological expressions, large powers,
                destructors, messages of exceptions that never end; processor time apart from wall time; the time of all requests together
    memory      at once, bit by bit, mapped, again and again after MemoryError; recursion in Python and in C
    output      printed, past the stream, to standard error, as one value, as garbage on the socket
    files       large, many, empty, without a name, removed but held open or in memory, between requests; reading and listing what is not the
                interpreter's; /proc, /sys, /dev; writing outside; `..`, symbolic and hard links, set-user-id bits, devices, pipes; changing the
                library; modes and times of the server's files; trees and names that are hard to remove
    secrets     environment, arguments, descriptors, memory of others; the zygote has none to give
    processes   fork, vfork, clone, exec, exec from memory, shells, spawning; threads by the thousand; with `commands`: fork bombs, daemons that
                outlive their parent or ignore signals, and all of these attacks from programs
    network     TCP, UDP, names, abstract and named Unix sockets, netlink, packets, vsock, datagram pairs
    others      ptrace, memory of other processes, signals to parents, groups and neighbours, also by way of a descriptor, limits of others, pidfd,
                SysV and POSIX queues, the room that all pipes of a user have
    privileges  set*id, capabilities, chroot, mount, pivot_root, unshare, setns, raised limits, personality, seccomp, prctl
    the kernel  io_uring, bpf, keyctl, userfaultfd, perf, fanotify, file handles, modules, kexec, quota, clone3; calls of other architectures
    crashes     segmentation faults, abort, exit, closed descriptors, illegal calls
    verdicts    exit codes, SystemExit, atexit, printed passes, overridden `__eq__`, subclassed values, patched builtins and modules, poisoned json,
                replies that are none, that come twice or early, that claim a limit which is seen from outside; a driver that is patched, traced,
                or overwritten in memory
    the server  values that cannot be sent on or written down; numbers, depths and hashes that cost much; talk byte by byte; requests that are not
                read; no free descriptor here or in the zygote; jobs that are opened while it closes
    remains     processes, files, mounts, descriptors, memory after jobs, after a killed zygote or guardian, and after a killed server

Not covered:

    - code that returns the right values for a wrong reason: that it looks them up, or was trained on the tests;
    - faults of the kernel behind the calls that are allowed, and of the processor (Spectre and its kin): declare an outer sandbox and use it;
    - what a job learns from the time things take, the list of processors, `uname`, `sysinfo` and its own /usr, and whatever lies in /usr as a program
      of the tool chain may read it;
    - load that limits allow: each session may use a processor, its memory, its disk in memory, and the caches that all share; with `commands`,
      memory and processor time are those of each process, of which there may be `processes` and 16 more;
    - in the landlock tier: files are watched every 50 ms, not bounded, so a burst can write a few hundred megabytes before it is ended: give the
      server a temporary folder of its own and of bounded size; whether a path exists, and its size, owner and times, can be asked; jobs of a user
      share its count of processes, so a bomb of threads may for its short life keep other sessions from starting any, also those of another server
      that is root on the same machine; programs that a job started outlive a zygote and a guardian that are killed at once;
    - a kernel that is out of memory ends jobs first, but picks among them by its own rules: keep the sum of all sessions' memory below the machine's;
    - code that raises MemoryError, or says that it met a limit, is taken at its word: it is stopped, and has only harmed itself.
"""
