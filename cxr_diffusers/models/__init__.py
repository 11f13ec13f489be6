"""What diffusers has no class for, one self-contained file each (torch and diffusers only): they travel too."""
