#!/usr/bin/env bash
# Several machines over ssh, without a batch system. Type it on the first of them, which is
# machine 0, with the others' names:
#   bash examples/train_ssh.sh "gpu08 gpu09" --name iluvatar --config V100x2x8 --nnodes 3 [flags]
# It needs ssh to the others without a password, and the checkout, the data and the output directory
# under the same paths on all machines. The rendezvous is at this machine's first address and port
# 29500, or at MASTER_ADDR and MASTER_PORT. The others get the exported GLOO_*, NCCL_*,
# OMP_NUM_THREADS and PYTHON.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # where sh is another shell, such as dash
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${1// /}" ]; then
    echo "Error: usage: bash examples/train_ssh.sh \"HOST ...\" FLAGS of run_training.sh" >&2
    exit 2
fi
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
read -ra hosts <<<"$1"
shift
address=${MASTER_ADDR:-$(hostname -I | cut -d ' ' -f 1)}
flags=("$@" --master_addr "$address" --master_port "${MASTER_PORT:-29500}")

variables=()
for name in ${!GLOO_@} ${!NCCL_@} OMP_NUM_THREADS PYTHON; do
    [ -z "${!name:-}" ] || variables+=("$name=${!name}")
done

remotes=()
for index in "${!hosts[@]}"; do
    # The form of the first array: before bash 4.4, an empty one is an error under set -u.
    printf -v remote '%q ' env ${variables[@]+"${variables[@]}"} bash "$root/run_training.sh" \
        "${flags[@]}" --node_rank $((index + 1))
    # ssh gets a session of its own, so that Ctrl-C reaches only the launcher here. Its ranks then
    # stop together with those of the other machines.
    setsid ssh -n -o BatchMode=yes "${hosts[index]}" "cd $(printf %q "$PWD") && $remote" &
    remotes+=($!)
done
bash "$root/run_training.sh" "${flags[@]}" --node_rank 0 &
here=$!

# Signals stop all machines: all ranks save after the same step and end. If this script is killed,
# the other machines lose the connection and end.
trap 'kill -TERM "$here"' TERM INT HUP
trap 'kill -USR1 "$here"' USR1
code=0
wait "$here" || code=$?
while kill -0 "$here" 2>/dev/null; do # a trap interrupted the wait
    code=0
    wait "$here" || code=$?
done
for index in "${!remotes[@]}"; do
    other=0
    wait "${remotes[index]}" || other=$?
    [ "$other" -eq "$code" ] || echo "${hosts[index]}: exit code $other" >&2
done
exit "$code"
