"""Many machines, through Ray: a job over folders of images, and an application that serves."""
