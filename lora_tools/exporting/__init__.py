"""What ``export`` puts into a folder: weights, graphs, adapters switched on at run time."""
