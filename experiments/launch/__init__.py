"""How does a run of several processes start? ``local.py`` on one machine, ``train.sbatch`` under SLURM."""
