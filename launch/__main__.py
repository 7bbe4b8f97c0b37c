"""`torchrun ... -m msn_dist.launch train CONFIG` is `msn train CONFIG` on every rank."""

from msn_dist.launch.cli import main

main()
