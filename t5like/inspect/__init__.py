"""What runs contain, and how they differ: reads run directories, and changes nothing."""
