"""`t5like plan`: memory, step time and cost of a run, predicted from its config and the name of a topology."""
