#!/bin/bash
# What scripts/test-vm runs in the machine, as root, in /work: install the wheels, then the tests of the kernel
# on cgroup v2, then pjwd as a service of systemd; or with before-power-cut what is to be cut off.
set -euo pipefail

# The module of the kernel that jobs need, and the one that tests of a dead file system need, where the others are not.
for module in overlay.ko fuse.ko; do
    [ ! -e $module ] || insmod $module
done

# Where packaging/pjwd.service looks for it. What only tests need lies there too.
if [ ! -e /opt/pjw/installed ]; then
    python3 -m venv --without-pip /opt/pjw
    install=(python3 -m pip --python /opt/pjw/bin/python --disable-pip-version-check install --quiet --no-compile
        --root-user-action=ignore --no-index --find-links /wheels)
    "${install[@]}" --require-hashes --requirement requirements/vm.txt
    "${install[@]}" --no-deps pjw pjw-client
    # the earlier commit, with the same libraries, as scripts/install-revision does it
    python3 -m venv --without-pip /opt/pjw-earlier
    python3 -m pip --python /opt/pjw-earlier/bin/python --disable-pip-version-check install --quiet --no-compile \
        --root-user-action=ignore --no-index --no-deps /wheels/earlier/pjw*.whl
    /opt/pjw/bin/python -c 'import site; print(site.getsitepackages()[0])' \
        >"$(/opt/pjw-earlier/bin/python -c 'import site; print(site.getsitepackages()[0])')/libraries.pth"
    touch /opt/pjw/installed
    sync # it must be there after a power cut
fi

export PJW_EARLIER=/opt/pjw-earlier
export PJW_VM_GUEST=1 # without it tests/vm is skipped
PJW_INIT=$(/opt/pjw/bin/python -c 'from pjw.launcher.spawn import INIT_PROGRAM; print(INIT_PROGRAM)')
export PJW_INIT # there is no compiler here: the one from the wheel

/opt/pjw/bin/pjwd check
if [ "$*" = before-power-cut ]; then
    exec /opt/pjw/bin/python -B -m tests.vm.power_cut
fi

# All that touches what is other here: cgroup v2, an older kernel, systemd. What is left out tests certificates, the port,
# requests, roles, clients, output, the table, the queue, a cluster, files and workspaces, the command line, the server's own tasks
# and what the launcher refuses, on any host; reads the filter of system calls with a compiler, which is not here; or
# injects faults by the hundred, which takes this machine too long.
# Those of systemd (tests/vm) have a machine of their own: they install a service.
if [ $# = 0 ]; then
    set -- tests/root
    for name in agents arrays arrays_service artifacts audit backup bad_input cli cli_exec cli_jobs cli_run \
        cli_run_failures cli_stdin cli_terminal client client_only cluster cluster_document cluster_growth cluster_queue cluster_skew \
        cluster_streams cluster_upgrade completion cp dead_tasks documents documents_world drain \
        faults_network faults_processes faults_resources faults_steps gateway_role grpc_fuzz hung_job identity_scope images_packages \
        init_seccomp input launcher_fuzz launcher_hostile library_document log_blocked logs no_disk \
        node_client operator port queue queue_after queue_changes queue_retry queue_service quota reload \
        requests retention roles scripts secrets serve slurm streaming tls top upload watch workspaces; do
        set -- "$@" --ignore "tests/root/test_$name.py"
    done
fi
PJW_PYTHON=/opt/pjw/bin/python exec scripts/run-tests --junitxml=/out/junit.xml --durations=10 "$@"
