/* The modes of the program; each takes the arguments after its name and returns the exit status. */
#ifndef MESSAGES_H
#define MESSAGES_H

int run_echo(int count, char **arguments);
int run_load(int count, char **arguments);
int run_reader(int count, char **arguments);
int run_firstbyte(int count, char **arguments);

#endif
