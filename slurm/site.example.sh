#!/usr/bin/env bash
# What only your site needs. Copy to slurm/site.sh and keep the lines that apply: train_multinode.sh sources that file on
# the job's first node, from the checkout, and hands its environment to every node. SITE=other.sh names another file.
# Nothing here is a default: every line is a comment until you want it.
# shellcheck disable=SC2034

# -- the environment (or leave it: VENV, then .venv in the checkout, then whatever `python` is) ---------------------------
# module purge
# module load python/3.11 cuda/12.8
# VENV=/shared/envs/sharpprior                       # a folder that every node sees
# export SHARPPRIOR_DATA=/shared/data/my_shards

# -- the network between nodes ------------------------------------------------------------------------------------------
# export NCCL_SOCKET_IFNAME=ib0                      # where NCCL meets, if it picks the wrong card (`ip -br addr` lists them)
# export GLOO_SOCKET_IFNAME=ib0                      # the same for CPU clusters and for host-side collectives
# export NCCL_IB_HCA=mlx5                            # InfiniBand adapters
# export FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1    # AWS EFA, with the aws-ofi-nccl plugin installed
# export NCCL_DEBUG=INFO                             # to see which of them NCCL took
# MAIN_ADDRESS=$(hostname -i | cut -d ' ' -f 1)      # the first node's address, where its name does not lead to it
# MAIN_PORT=23456                                    # default: from the job's number, below the ephemeral range

# -- containers: options for every srun ---------------------------------------------------------------------------------
# SRUN_OPTIONS=(--container-image=/shared/images/sharpprior.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# SRUN_OPTIONS+=(--mpi=none)

# -- limits -------------------------------------------------------------------------------------------------------------
# ulimit -n 65536                                    # many loader workers open many files
# export OMP_NUM_THREADS=4
