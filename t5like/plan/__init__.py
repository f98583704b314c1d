"""What a run will need and how fast it will be, from its config and a topology's name alone: `t5like plan`."""
