#!/usr/bin/env bash
# One node's part of a run on several nodes: start this on every node at once, with the same arguments, which are those
# of `msn`. slurm.sbatch and kubernetes/ end here as well. docs/launch.md is the walk-through.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 NPROC_PER_NODE=8 launch/torchrun.sh train CONFIG --out /shared/runs/one
#
#   NNODES           nodes of the run
#   NODE_RANK        of this node, from 0; node 0 prints the console lines
#   MASTER_ADDR      node 0, by a name or address that all nodes reach
#   NPROC_PER_NODE   processes on this node, one per GPU
#   MASTER_PORT      a free port of node 0 (29500)
#   JOIN_SECONDS     how long a node waits for the others to come (900)
#   PYTHON           the interpreter that has msn_dist (python3)
#
# Exit code: that of `msn` (0, 1, 2 bad input, 3 the plan does not fit, 4 lost peer), or 128 + signal.
set -euo pipefail

refuse() {
    echo "launch/torchrun.sh: $1" >&2
    exit 2
}

for name in NNODES NODE_RANK MASTER_ADDR NPROC_PER_NODE; do
    [[ -n "${!name:-}" ]] || refuse "$name is not set; the head of this file says what it is"
done
for name in NNODES NPROC_PER_NODE; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || refuse "$name=${!name} is not a positive whole number"
done
[[ "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] && ((NODE_RANK < NNODES)) ||
    refuse "NODE_RANK=$NODE_RANK is not between 0 and NNODES - 1 = $((NNODES - 1))"
(($#)) || refuse "no command; for example: train CONFIG --out /shared/runs/one"
[[ "$1" != train || " $* " == *" --out"[=\ ]* ]] ||
    refuse "train needs --out DIR: a new run directory on storage that all nodes see"

# torchrun itself leaves one thread to each process.
cores=$(env -u OMP_NUM_THREADS nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC_PER_NODE ? cores / NPROC_PER_NODE : 1))}"
# NCCL's own reason for a connection that fails; silent otherwise.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

MASTER_PORT="${MASTER_PORT:-29500}"
echo "node $NODE_RANK of $NNODES, $(hostname): $NPROC_PER_NODE processes, meeting at $MASTER_ADDR:$MASTER_PORT"

# The static rendezvous: the nodes of a run are fixed, as it cannot go on with fewer, and node 0 has rank 0. With c10d
# ranks are dealt by host name, and an agent whose store has gone ends its ranks before they can tell whom they lost.
# exec: a signal to this script is one to the agent, which passes it on to its processes.
exec "${PYTHON:-python3}" -m msn_dist.launch.agent \
    --rdzv-backend static \
    --rdzv-conf "timeout=${JOIN_SECONDS:-900}" \
    --nnodes "$NNODES" \
    --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    --nproc-per-node "$NPROC_PER_NODE" \
    --max-restarts 0 \
    -m msn_dist.launch "$@"
