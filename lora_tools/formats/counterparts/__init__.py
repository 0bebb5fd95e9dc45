"""Names of a diffusion model in its makers' layout and in diffusers', a file for each family."""
