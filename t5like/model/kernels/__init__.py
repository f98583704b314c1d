"""Matrix products and attention written for one kind of device."""
