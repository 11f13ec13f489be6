"""Networks that diffusers has no class for; one self-contained file each, because they travel with the weights."""
